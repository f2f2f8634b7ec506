"""Unsupported features are refused at start-up by name, and selection does what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import pytest
from kakeya_vllm import lib, register, runtime, support, version
from kakeya_vllm.config import ConfigError
from kakeya_vllm.seed.impl import SeedImpl
from kakeya_vllm.support import UnsupportedFeature

pytestmark = pytest.mark.cpu_only

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 128,
    "torch_dtype": "bfloat16",
}


def configure(directory: Path, model: dict[str, Any] | None = None, **options: Any) -> Any:
    """The VllmConfig of a model that has a config and no weights."""
    from vllm.engine.arg_utils import EngineArgs

    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(QWEN2 | (model or {})))
    options = {"attention_backend": "KAKEYA", "skip_tokenizer_init": True} | options
    return EngineArgs(model=str(directory), enforce_eager=True, **options).create_engine_config()


def test_a_plain_model_is_accepted_and_settings_travel(tmp_path: Path) -> None:
    config = configure(tmp_path, additional_config={"other": 1})
    assert register.is_selected(config)
    assert config.additional_config["other"] == 1
    assert config.additional_config["kakeya"]["recipe"] == "kakeya-free-4.6x"


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"block_size": 64}, "block size 64 (valid: 128"),
        ({"block_size": 256}, "block size 256 (valid: 128"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8 (valid: auto or bfloat16"),
        ({"prefix_match_unit": 32}, "prefix_match_unit 32"),
        ({"kv_offloading_size": 1.0}, "KV offloading without a GPU (vLLM's OffloadingConnector"),
        ({"tensor_parallel_size": 4}, "4 tensor-parallel ranks for 2 KV heads"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "the KV connector ExampleConnector (valid: KakeyaConnector, and on a GPU Offload",
        ),
    ],
)
def test_options_refused_by_name(tmp_path: Path, options: dict[str, Any], feature: str) -> None:
    with pytest.raises(UnsupportedFeature) as error:
        configure(tmp_path, **options)
    assert feature in str(error.value)


def test_checks_of_pages_and_pages_of_others(tmp_path: Path) -> None:
    extra = {"folder": str(tmp_path)}
    connector = {"kv_connector": "KakeyaConnector", "kv_role": "kv_both"}
    options = {"kv_transfer_config": connector | {"kv_connector_extra_config": extra}}
    assert register.is_selected(configure(tmp_path, **options))
    with pytest.raises(UnsupportedFeature, match="KAKEYA_VERIFY=1 with a KV connector"):
        configure(tmp_path, additional_config={"kakeya": {"verify": "1"}}, **options)


# Of one architecture where that is possible: vLLM takes long to look at a new one.
WINDOW = {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 0}
CHUNKED = {"layer_types": ["chunked_attention", "full_attention"]}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize(
    ("model", "feature"),
    [
        (WINDOW, "sliding-window attention in all layers"),
        (CHUNKED, "chunked local attention"),
        (DEEPSEEK, "MLA"),
        ({"hidden_size": 320}, "head_dim 80 (valid: 64, 96, 128, 256)"),
    ],
)
def test_models_refused_by_name(tmp_path: Path, model: dict[str, Any], feature: str) -> None:
    with pytest.raises(UnsupportedFeature) as error:
        configure(tmp_path, model)
    assert feature in str(error.value)


def a_model(layer_types: Sequence[str] = (), **more: Any) -> SimpleNamespace:
    """As much of a ModelConfig as refusals look at."""
    flags = ("use_mla", "is_encoder_decoder", "is_attention_free", "is_hybrid")
    about = dict.fromkeys((*flags, "uses_alibi", "uses_mrope"), False)
    about["hf_text_config"] = SimpleNamespace(layer_types=layer_types)
    about["get_sliding_window"] = lambda: None
    return SimpleNamespace(**about | more)


WINDOWS = ("sliding_attention", "full_attention")


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"is_encoder_decoder": True}, "cross attention (an encoder-decoder model)"),
        ({"is_attention_free": True}, "a model without attention layers"),
        ({"is_mm_prefix_lm": True}, "bidirectional attention over image tokens (prefix LM)"),
        ({"rswa_window": 512}, "reference sliding-window attention"),
        ({"is_diffusion": True}, "diffusion language models"),
    ],
)
def test_kinds_of_models_refused_by_name(change: dict[str, Any], feature: str) -> None:
    assert support._model_features(a_model()) == []
    assert support._model_features(a_model(**change)) == [feature]


def test_a_hybrid_model_with_windows_is_refused() -> None:
    config = SimpleNamespace(
        model_config=a_model(WINDOWS, is_hybrid=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
    )
    assert support._hybrid_features(config) == ["a hybrid model with sliding-window layers"]


def test_settings_of_the_cache_refused_by_name() -> None:
    cache = SimpleNamespace(
        cache_dtype="auto", user_specified_block_size=False, kv_sharing_fast_prefill=True
    )
    config = SimpleNamespace(
        cache_config=cache,
        model_config=SimpleNamespace(dtype="torch.bfloat16"),
        attention_config=SimpleNamespace(backend_per_kind={"mamba": "KAKEYA"}),
    )
    assert support._cache_features(config, lib.BLOCK_TOKENS) == [
        "kv_sharing_fast_prefill",
        "backend_per_kind for mamba (valid: full_attention only)",
    ]


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    kind = type(current_platform)
    monkeypatch.setattr(kind, "is_cpu", lambda _: False)
    monkeypatch.setattr(kind, "device_name", "tpu")
    assert support._platform_features(None) == ["the tpu platform (valid: CPU, CUDA)"]


def test_a_drafter_beside_windows_is_refused() -> None:
    for models in ((WINDOWS, ()), ((), WINDOWS)):
        model, drafter = map(a_model, models)
        speculative = SimpleNamespace(draft_model_config=drafter, attention_backend=None)
        config = SimpleNamespace(
            model_config=model,
            speculative_config=speculative,
            attention_config=SimpleNamespace(backend_per_kind=None),
        )
        (found,) = support._draft_model_features(config)
        assert "a draft model where either model has sliding-window layers" in found


@pytest.mark.parametrize(
    ("settings", "model", "feature"),
    [
        ({"seed": SimpleNamespace(name="v1.3-ppl")}, a_model(is_hybrid=True), "with a hybrid"),
        ({"seed": SimpleNamespace(name="v1.3-ppl")}, a_model(WINDOWS), "with a model that mixes"),
        ({"prefill": "sealed"}, a_model(), "KAKEYA_PREFILL=sealed on a GPU (valid: raw)"),
    ],
)
def test_settings_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], model: Any, feature: str
) -> None:
    from vllm.platforms import current_platform

    plain = {"verify": False, "seed": None, "boundary_skip_layers": (), "prefill": "raw"}
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: "prefill" not in settings)
    config = SimpleNamespace(model_config=model)
    with pytest.raises(UnsupportedFeature) as error:
        support.check_settings(SimpleNamespace(**plain | settings), config)
    assert feature in str(error.value)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"head_size_v": 128}, "value heads of another size than key heads (128, 64)"),
        ({"layer_name": "model.attn"}, "name does not hold exactly one layer number"),
    ],
)
def test_layers_that_show_themselves_refused_by_name(change: dict[str, Any], feature: str) -> None:
    layer = {"head_size": 64, "head_size_v": 64, "layer_name": "model.layers.3.attn"}
    support.check_layer(SimpleNamespace(**layer))
    with pytest.raises(UnsupportedFeature) as error:
        support.check_layer(SimpleNamespace(**layer | change))
    assert feature in str(error.value)


@pytest.mark.parametrize(
    ("names", "heads", "feature"),
    [
        (["layers.0.attn", "layers.1.attn"], [2, 1], "layers with differing heads"),
        (["layers.0.attn", "layers.0.other"], [2, 2], "several attention modules in layer 0"),
        (["layers.0.attn", "layers.2.attn"], [2, 2], "attention layers outside the model's 2"),
    ],
)
def test_layers_that_no_codec_describes(names: list[str], heads: list[int], feature: str) -> None:
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64}
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
    layers = {
        name: SimpleNamespace(num_kv_heads=count, head_size=64)
        for name, count in zip(names, heads, strict=True)
    }
    with pytest.raises(UnsupportedFeature) as error:
        runtime._check_layers(layers, shape, config)
    assert feature in str(error.value)


@pytest.mark.parametrize(
    ("extras", "feature"),
    [
        ({"soft_cap": 30.0, "sinks": None}, "logits soft cap with a recipe of the seed"),
        ({"soft_cap": 0.0, "sinks": object()}, "attention sinks with a recipe of the seed"),
    ],
)
def test_a_recipe_of_the_seed_beside_them_is_refused(extras: dict[str, Any], feature: str) -> None:
    layer = object.__new__(SeedImpl)
    layer.__dict__.update(extras)
    with pytest.raises(UnsupportedFeature, match=feature):
        layer.bind(None, 0, 0)


def test_heads_are_those_of_the_codec() -> None:
    library = lib.load()

    def has_pages(head_dim: int) -> bool:
        try:
            return library.recipe_page_bytes("kakeya-free-4.6x", head_dim) > 0
        except lib.KakeyaError:
            return False

    assert tuple(filter(has_pages, range(1, 600))) == lib.HEAD_DIMS


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sliding_window": 512}, "sliding-window attention (window 512)"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share another layer's KV cache"),
        ({"others": {"chunk_lookback": 3}}, "the attention option chunk_lookback"),
    ],
)
def test_layers_refused_by_name(arguments: dict[str, Any], feature: str) -> None:
    support.check_impl()
    with pytest.raises(UnsupportedFeature) as error:
        support.check_impl(**arguments)
    assert feature in str(error.value)


class Parallel:
    decode_context_parallel_size = 1
    prefill_context_parallel_size = 1
    use_ubatching = False

    def __init__(self, **changes: Any) -> None:
        self.__dict__.update(changes)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"decode_context_parallel_size": 2}, "(DCP)"),
        ({"prefill_context_parallel_size": 2}, "(PCP)"),
        ({"use_ubatching": True}, "micro-batching"),
    ],
)
def test_parallelism_refused_by_name(change: dict[str, Any], feature: str) -> None:
    assert support._parallel_features(Parallel()) == []
    (found,) = support._parallel_features(Parallel(**change))
    assert feature in found


def test_speculation(tmp_path: Path) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    assert configure(tmp_path, speculative_config=ngram).speculative_config is not None
    many = ngram | {"num_speculative_tokens": 60}
    with pytest.raises(UnsupportedFeature, match="60 speculative tokens"):
        configure(tmp_path, speculative_config=many)


@pytest.mark.parametrize(
    ("method", "speculative", "options", "feature"),
    [
        ("medusa", {}, {}, "speculative decoding with medusa (valid: ngram, suffix, draft_model"),
        ("draft_model", {"attention_backend": "KAKEYA"}, {}, "KAKEYA for the layers of a draft"),
        # vLLM hands this on to every model of the engine.
        (
            "draft_model",
            {},
            {
                "attention_backend": None,
                "attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}},
            },
            "KAKEYA for the layers of a draft",
        ),
    ],
)
def test_drafters_that_are_refused(
    tmp_path: Path, method: str, speculative: Any, options: Any, feature: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    drafts = {"method": method, "model": str(tmp_path), "num_speculative_tokens": 2}
    with pytest.raises(UnsupportedFeature) as error:
        configure(tmp_path / "target", speculative_config=drafts | speculative, **options)
    assert feature in str(error.value)


def test_layer_numbers() -> None:
    assert support.layer_index("model.layers.12.self_attn.attn") == 12
    assert support.layer_index("attn") is None
    assert support.layer_index("encoder.0.layers.1.attn") is None


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (
            "KAKEYA_BOUNDARY_SKIP_LAYERS",
            "0, 2",
            "the model has 2 layers; valid: numbers from 0 to 1",
        ),
        ("KAKEYA_BOUNDARY_SKIP_LAYERS", "first", "'first' is not a layer number"),
        ("KAKEYA_PREFILL", "half", "valid: raw or sealed"),
        ("KAKEYA_RECIPE", "kakeya-2.0x", "kakeya-free-4.6x"),
        ("KAKEYA_RECIPE", "kakeya-4.6x", "kakeya calibrate"),
    ],
)
def test_malformed_settings_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        configure(tmp_path)
    assert reason in str(error.value)
    assert not register.is_selected(configure(tmp_path, attention_backend=None))


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "first"),
    [(8, 1, [0]), (8, 4, [0, 2, 4, 6]), (3, 3, [0, 1, 2]), (2, 4, [0, 0, 1, 1]), (1, 2, [0, 0])],
)
def test_first_kv_head_of_each_rank(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, ranks: int, first: list[int]
) -> None:
    """vLLM gives neighbouring ranks the same head when there are more ranks than heads."""
    import vllm.distributed

    config = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: kv_heads),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda r=rank: r)
        found.append(runtime.first_kv_head(config))
    assert found == first


# --- selection ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["KAKEYA", "kakeya", " Kakeya "])
def test_the_variable_selects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", value)
    assert register.is_selected(configure(tmp_path, attention_backend=None))


def test_an_explicit_flag_wins_over_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "KAKEYA")
    config = configure(tmp_path, attention_backend="CPU_ATTN")
    assert not register.is_selected(config)
    assert "kakeya" not in config.additional_config


def test_another_value_of_the_variable_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH_ATTN")
    config = configure(tmp_path, attention_backend=None)
    assert config.attention_config.backend is None


def test_registering_again_does_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs

    register.register()
    before = EngineArgs.create_engine_config
    register.register()
    assert EngineArgs.create_engine_config is before


def test_an_untested_vllm_is_refused_when_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "installed", lambda: "0.99.0")
    monkeypatch.delenv(version.OVERRIDE, raising=False)
    with pytest.raises(version.UnsupportedVllm, match=r"0\.32\.x and 0\.33\.x"):
        configure(tmp_path)
    configure(tmp_path, attention_backend=None)  # whoever did not ask is left alone
    monkeypatch.setenv(version.OVERRIDE, "1")
    configure(tmp_path)


def script(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    with engines.variables(env):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
        )


def test_registering_imports_nothing_heavy() -> None:
    code = """
import sys
import vllm.v1.attention.backends.registry
from kakeya_vllm.register import register
before = set(sys.modules)
register()
new = {n for n in set(sys.modules) - before if not n.startswith("kakeya_vllm")}
heavy = {n for n in new if n.split(".")[0] in ("torch", "vllm", "transformers")}
assert not heavy, heavy
assert "kakeya_vllm.lib" not in sys.modules
print("fine")
"""
    done = script(code)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_a_foreign_custom_backend_is_refused_loudly() -> None:
    code = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
register_backend(AttentionBackendEnum.CUSTOM, "somebody.Else")
from kakeya_vllm.register import register
register()
assert AttentionBackendEnum.CUSTOM.get_path() == "somebody.Else"
print("registered")
"""
    assert script(code).stdout.strip().endswith("registered")  # silent when not selected
    done = script(code, VLLM_ATTENTION_BACKEND="KAKEYA")
    assert done.returncode != 0
    assert "belongs to somebody.Else" in done.stderr
