"""Hybrid models: attention layers are compressed, and a block of the one pool is as many pages as a
state takes."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import hybrid
import mixed
import pytest
import torch
from kakeya_vllm import banner, calibrate, lib
from kakeya_vllm.evaluation.command import refuse_mixed
from kakeya_vllm.hybrid import is_state
from kakeya_vllm.support import UnsupportedFeature

# With whole prompts on a GPU: pieces read each other's pages there, and by which sums makes codes.
WHOLE = mixed.OPTIONS | ({"max_num_batched_tokens": 4096} if engines.on_gpu() else {})
# Log-probabilities that agree except for the order of sums, of float32 and of bfloat16.
CLOSE = 0.25 if engines.on_gpu() else 0.05


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("hybrid")
    return functools.cache(lambda name: hybrid.make(root / name, name))


# vLLM turns LFM 2's keys wrongly on the CPU (test_probe.py).
LFM2 = pytest.param("lfm2", marks=pytest.mark.gpu)


@pytest.mark.parametrize("name", ["qwen3_next", "granite", "falcon_h1", LFM2])
def test_attention_is_compressed_and_states_stay(models: Any, name: str) -> None:
    """What a model says of prompts moves by what the recipe loses, and less with more bits. The
    verifier compares seals and outputs with references."""
    # vLLM's Mamba 2 for the CPU stops at a prompt's state that is to be kept, with any cache.
    caching = "mamba_n_heads" not in hybrid.MODELS[name]
    found = mixed.measured(
        models(name), hybrid.EXACT, enable_prefix_caching=caching, **hybrid.OPTIONS
    )
    moved = {ratio: mixed.apart(found[ratio], found["stock"]) for ratio in mixed.RATIOS}
    print(name, moved)
    assert 0 < moved["2.7x"] < moved["6.4x"]
    assert found["compressed"] == hybrid.attention_layers(name)
    assert found["checked"]["outputs"] > 0
    about = hybrid.COMMON | hybrid.MODELS[name]
    page = lib.load().recipe_page_bytes("kakeya-free-6.4x", about["head_dim"])
    page *= about["num_key_value_heads"]
    states = [group for group in found["groups"] if group["kind"] == "MambaSpec"]
    (attention,) = (group for group in found["groups"] if group["kind"] != "MambaSpec")
    pages = attention["block"] // lib.BLOCK_TOKENS
    assert attention["used"] == attention["bytes"] == pages * page
    for state in states:  # the fewest pages that it fits into
        assert state["bytes"] == pages * page
        assert (pages - 1) * page < state["used"] <= pages * page
    assert pages > 1 or name == "lfm2"  # whose states are small


def test_requests_together_equal_each_alone(models: Any) -> None:
    """With preemption: blocks of one pool go from states to pages and back. Where a prompt is cut
    into steps shows in the last digits of a state, so that now and then a code flips."""
    options = WHOLE | {"dtype": engines.exact_dtype(), "enable_prefix_caching": False}
    prompts = mixed.prompts()
    with engines.engine(models("falcon_h1"), hybrid.CHECKED, **options) as engine:
        assert engine.runtime.pages_per_block > 1
        check_capacity(engine)
        alone = [engine.run([prompt], 100)[0] for prompt in prompts]
        together = engine.run(prompts, 100)
        assert engine.open_blocks.in_use <= len(prompts)
    small = options | {"num_gpu_blocks_override": 9, "max_model_len": 1024}
    with engines.engine(models("falcon_h1"), hybrid.CHECKED, **small) as engine:
        crowded = engine.run(3 * prompts, 100)
        assert engine.counter("vllm:num_preemptions") > 0
    # On a GPU a request that comes back reads its own tokens as they were.
    parts = (together, crowded[:4], crowded[4:8], crowded[8:])
    for runs in parts[:1] if engines.on_gpu() else parts:
        for run, expected in zip(runs, alone, strict=True):
            engines.assert_same_run(run, expected, CLOSE)


def check_capacity(engine: engines.Engine) -> None:
    """The start-up block names what requests of the longest kind take with either cache."""
    cache = engine.worker(lambda worker: worker.model_runner.kv_cache_config)
    (line,) = (x for x in banner.compose(engine.runtime, cache) if "capacity" in x)
    found = re.search(r"(\d+) tokens in requests of (\d+), about (\d+) uncompressed", line)
    assert found
    compressed, longest, uncompressed = map(int, found.groups())
    specs = banner.layer_specs(cache)
    states = sum(s.state_content_size_bytes for s in specs.values() if is_state(s))
    about = hybrid.COMMON
    token = 2 * about["num_key_value_heads"] * 64 * getattr(torch, engines.exact_dtype()).itemsize
    request = about["num_hidden_layers"] * longest * token + states
    # Of whole blocks.
    assert uncompressed == pytest.approx(engines.KV_BYTES / request * longest, rel=1e-3)
    assert compressed > uncompressed


def test_prefix_hits_give_the_same(models: Any) -> None:
    """Of whole blocks, each of several pages and a state."""
    found = mixed.elsewhere(hybrid.__file__, models("qwen3_next"))
    block = found["block"]
    assert block == found["pages"] * lib.BLOCK_TOKENS > lib.BLOCK_TOKENS
    expected = [(length - 1) // block * block for length in mixed.LENGTHS]
    assert [run["cached"] for run in found["second"]] == expected
    assert any(expected)
    if engines.on_gpu():  # there a prompt that hits its blocks reads what they lost
        return
    for name in ("tokens", "logprobs"):
        assert [run[name] for run in found["first"]] == [run[name] for run in found["second"]]


# In bfloat16, a GPU's type, sums over ranks move this model's log-probabilities by 0.3 to 0.6.
@pytest.mark.cpu_only
def test_two_ranks_in_processes_of_their_own(models: Any) -> None:
    """Spawned engine and workers: all agree on a block, and half of the heads and of the states on
    each rank say what one process says."""
    options = mixed.OPTIONS | {"dtype": "float32", "enable_prefix_caching": False}
    with engines.engine(models("granite"), hybrid.CHECKED, **options) as engine:
        expected = engine.run(mixed.prompts(), 16)
    spawned = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        # The workers share this machine's cores; vLLM would otherwise want a NUMA node each.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    two = engines.run_elsewhere(
        models("granite"),
        mixed.prompts(),
        16,
        env=hybrid.CHECKED | spawned,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **options,
    )
    for run, one in zip(two["runs"], expected, strict=True):
        engines.assert_same_run(run, one, CLOSE)


@pytest.mark.parametrize("name", ["granite", "falcon_h1"])  # the latter's names are no places
@pytest.mark.usefixtures("own_environment")  # the calibration's engine sets variables
def test_a_calibration_has_the_attention_layers(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from safetensors.torch import load_file

    model = engines.add_byte_tokenizer(models(name))
    monkeypatch.setenv("KAKEYA_CACHE", str(tmp_path))
    out = tmp_path / "artefact.safetensors"
    calibrate.calibrate(
        str(model), tokens=2 * 2048, out=out, settings={"dtype": engines.exact_dtype()}
    )
    variances = load_file(out)["k_var"]
    assert [i for i, layer in enumerate(variances) if layer.any()] == hybrid.attention_layers(name)
    env = hybrid.EXACT | {"KAKEYA_CALIBRATION": str(out), "KAKEYA_RECIPE": "kakeya-4.6x"}
    options = mixed.OPTIONS | {"dtype": engines.exact_dtype(), "enable_prefix_caching": False}
    with engines.engine(model, env, **options) as engine:
        assert [len(run.tokens) for run in engine.run(mixed.prompts(), 5)] == [5] * 4


def test_the_simulation_refuses_it(models: Any) -> None:
    with pytest.raises(SystemExit, match="is a hybrid model, which this evaluation does not"):
        refuse_mixed(str(models("falcon_h1")))
    with pytest.raises(SystemExit, match="is a hybrid model"):
        refuse_mixed(str(models("granite")))


def test_doctor_counts_the_attention_layers(models: Any, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    model = engines.add_byte_tokenizer(models("granite"))
    command = [sys.executable, "-m", "kakeya_vllm.cli", "doctor", str(model), "--json", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert "2 compressed, 0 kept in bfloat16, 2 keep a state" in done.stdout
    figures = json.loads(out.read_text())["figures"]
    assert (figures["layers"], figures["state_layers"]) == (2, 2)
    page = lib.load().recipe_page_bytes(figures["recipe"], 64)
    assert figures["bytes_per_token"]["kakeya"] == 2 * 2 * page / lib.BLOCK_TOKENS
    assert "capacity_tokens" not in figures


@pytest.mark.parametrize(
    ("options", "env", "feature"),
    [
        ({}, {"KAKEYA_BOUNDARY_SKIP_LAYERS": "3"}, "boundary layers in a hybrid model"),
        ({"speculative_config": engines.NGRAM}, {}, "a hybrid model with speculative decoding"),
        ({"pipeline_parallel_size": 2}, {}, "a hybrid model with pipeline parallelism"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "KakeyaConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"folder": "/nowhere"},
                }
            },
            {},
            "KV connectors with a hybrid model",
        ),
        ({"block_size": 256}, {}, "block size 256"),
    ],
)
def test_refused_by_name(
    models: Any, options: dict[str, Any], env: dict[str, str], feature: str
) -> None:
    engines.need_gpus(options.get("pipeline_parallel_size", 1))
    with (
        pytest.raises(UnsupportedFeature, match=feature),
        engines.engine(models("granite"), env, **(mixed.OPTIONS | options)),
    ):
        pass


def test_more_attention_layers_than_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["attention", "attention", "attention", "mamba"]
    monkeypatch.setitem(hybrid.MODELS, "granite", hybrid.MODELS["granite"] | {"layer_types": kinds})
    model = hybrid.make(tmp_path / "model", "granite")
    with (
        pytest.raises(UnsupportedFeature, match="compressed layers in 3 KV cache groups"),
        engines.engine(model, {}, **mixed.OPTIONS),
    ):
        pass
