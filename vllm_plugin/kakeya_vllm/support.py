"""What KAKEYA refuses, by name and at start-up.

A feature that is not listed in docs/vllm.md as supported must not run with quietly wrong answers,
so every configuration is checked twice: by the process that builds the engine, before anything is
spawned, and by every worker. What only a layer knows (ALiBi, shared caches) is checked when the
layer is built.
"""

from __future__ import annotations

import functools
from typing import Any

from kakeya_vllm import config, hybrid, lib, register, transfer, version
from kakeya_vllm.lib import BLOCK_TOKENS, HEAD_DIMS

# Where drafts may come from: without a model, or from one with layers of its own. To those vLLM
# gives a backend of its own choice, so they keep the stock cache.
MODEL_FREE_SPECULATION = ("ngram", "suffix")
DRAFT_MODELS = ("draft_model", "eagle")


class UnsupportedFeature(ValueError):
    """Features of the model or the configuration that KAKEYA does not support, by name."""

    def __init__(self, features: list[str], where: str = "") -> None:
        place = f" ({where})" if where else ""
        super().__init__(f"KAKEYA does not support{place}: " + "; ".join(features))
        self.features = features


def layer_index(prefix: str) -> int | None:
    """Number of the layer in a module name, ``model.layers.3.self_attn.attn`` -> 3.

    None when the name has no number or more than one: such a layer cannot be told apart.
    """
    numbers = [part for part in prefix.split(".") if part.isdigit()]
    return int(numbers[0]) if len(numbers) == 1 else None


def is_draft_layer(name: str, num_layers: int) -> bool:
    """Whether an attention layer of the engine belongs to a draft model: vLLM calls it so, or
    numbers it after the ``num_layers`` layers of the model."""
    index = layer_index(name)
    return name.startswith("draft_model.") or (index is not None and index >= num_layers)


def windowed_layers(text_config: Any) -> tuple[int, ...]:
    """Numbers of the sliding-window layers of a model that has full-attention layers as well."""
    kinds = getattr(text_config, "layer_types", None) or ()
    if "full_attention" not in kinds:
        return ()
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def other_layers(model_config: Any) -> str:
    """A name for models whose layers do not all keep every token; empty for any other."""
    if hybrid.is_hybrid(model_config):
        return "a hybrid model"
    if windowed_layers(model_config.hf_text_config):
        return "a model that mixes full and sliding-window layers"
    return ""


def check_config(vllm_config: Any) -> None:
    """Raise UnsupportedFeature if anything in the engine's configuration is not supported, and
    ConfigError for a recipe of the seed that cannot be served."""
    seed = config.chosen_seed(vllm_config.additional_config)
    block = BLOCK_TOKENS if seed is None else seed.k.block_rows
    platform = _platform_features if seed is None else functools.partial(_seed_features, seed.name)
    features = [
        *platform(vllm_config),
        *_model_features(vllm_config.model_config),
        *(_head_features(vllm_config.model_config) if seed is None else ()),
        *_cache_features(vllm_config, block),
        *transfer.features(
            vllm_config,
            seed=seed is not None,
            mixed=other_layers(vllm_config.model_config),
        ),
        *_parallel_features(vllm_config.parallel_config),
        *_hybrid_features(vllm_config),
        *_replicated_heads(vllm_config),
        *_speculative_features(vllm_config),
    ]
    if features:
        raise UnsupportedFeature(features)


def _seed_features(name: str, vllm_config: Any) -> list[str]:
    """What a recipe of the seed does not do and others do."""
    from vllm.platforms import current_platform

    found = []
    if not current_platform.is_cpu():
        found.append(
            f"recipe {name} on a GPU (it is served on the CPU only; on a GPU `kakeya eval` "
            "simulates it)"
        )
    if vllm_config.speculative_config is not None:
        # Drafts that fill a block would be sealed and then sealed again, at 20 ms a head, and might
        # have more outliers than a page has room for.
        found.append(f"speculative decoding with recipe {name}")
    return found


def _platform_features(vllm_config: Any) -> list[str]:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return []
    if not current_platform.is_cuda():
        return [f"the {current_platform.device_name} platform (valid: CPU, CUDA)"]
    archs = lib.load().cuda_archs
    return _cuda_features(vllm_config, current_platform, archs, version.allowed_on_gpu())


def _cuda_features(
    vllm_config: Any, platform: Any, archs: str, tried_vllm: bool = True
) -> list[str]:
    """What the CPU serves and the kernels do not. ``archs``: what libkakeya has kernels for;
    ``tried_vllm``: whether this vLLM was run on a GPU with KAKEYA."""
    from kakeya_vllm import cuda

    model = vllm_config.model_config
    if not archs:
        return [
            "GPUs with this libkakeya, which was built without kernels (build it on a machine "
            "with an NVIDIA GPU, or after `make kernels`)"
        ]
    found = []
    if not tried_vllm:
        found.append(f"vLLM {version.installed()} on a GPU (valid: 0.33.x)")
    if not platform.has_device_capability(cuda.MIN_CAPABILITY):
        found.append("GPUs before compute capability 8.0")
    if model.dtype not in cuda.DTYPES:
        found.append(f"{model.dtype} on a GPU (valid: bfloat16, float16)")
    speculative = vllm_config.speculative_config
    if speculative is not None and (speculative.num_speculative_tokens or 0) >= cuda.MAX_QUERY:
        found.append(
            f"{speculative.num_speculative_tokens} speculative tokens on a GPU "
            f"(valid: up to {cuda.MAX_QUERY - 1})"
        )
    return found


def check_settings(settings: Any, vllm_config: Any) -> None:
    """Raise UnsupportedFeature for settings that this machine or configuration does not serve."""
    from vllm.platforms import current_platform

    if settings.verify and settings.seed is not None:
        raise UnsupportedFeature([f"KAKEYA_VERIFY=1 with recipe {settings.seed.name}"])
    if settings.verify and vllm_config.kv_transfer_config is not None:
        # Loaded pages were not sealed here, so there is no checksum to hold them to.
        raise UnsupportedFeature(["KAKEYA_VERIFY=1 with a KV connector"])
    if settings.verify and not current_platform.is_cpu():
        mode = vllm_config.compilation_config.cudagraph_mode
        if getattr(mode, "name", "NONE") != "NONE":
            # The checks wait for the device, which a captured graph cannot.
            raise UnsupportedFeature(
                [f"KAKEYA_VERIFY=1 with CUDA graphs ({mode.name}); add --enforce-eager"]
            )
    if mixed := other_layers(vllm_config.model_config):
        # Both would be layers with pages of yet another size.
        if settings.boundary_skip_layers:
            raise UnsupportedFeature([f"boundary layers in {mixed}"])
        if settings.seed is not None:
            raise UnsupportedFeature([f"recipe {settings.seed.name} with {mixed}"])
    if settings.prefill == "sealed" and not current_platform.is_cpu():
        raise UnsupportedFeature(["KAKEYA_PREFILL=sealed on a GPU (valid: raw)"])


def _model_features(model: Any) -> list[str]:
    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    found = []
    if model.use_mla:
        found.append("MLA (multi-head latent attention)")
    if model.is_encoder_decoder:
        found.append("cross attention (an encoder-decoder model)")
    if model.is_attention_free:
        found.append("a model without attention layers")
    if model.uses_alibi:
        found.append("ALiBi")
    if model.uses_mrope:
        found.append("M-RoPE")
    if getattr(model, "is_mm_prefix_lm", False):
        found.append("bidirectional attention over image tokens (prefix LM)")
    if getattr(text, "is_heterogeneous", False):
        found.append("layers that differ in their heads or other settings (a heterogeneous config)")
    if getattr(model, "rswa_window", None) is not None:
        found.append("reference sliding-window attention")
    if getattr(model, "is_diffusion", False):
        found.append("diffusion language models")
    if "chunked_attention" in kinds:
        found.append("chunked local attention")
    elif "full_attention" not in kinds and (
        "sliding_attention" in kinds or model.get_sliding_window() is not None
    ):
        found.append("sliding-window attention in all layers")
    return found


def _head_features(model: Any) -> list[str]:
    """Heads that the codec has no pages for. Recipes of the seed take any."""
    dim = model.get_head_size()
    if model.use_mla or model.is_attention_free or dim in HEAD_DIMS:
        return []
    return [f"head_dim {dim} (valid: {', '.join(map(str, HEAD_DIMS))})"]


def _cache_features(vllm_config: Any, block: int) -> list[str]:
    """What of the cache's settings is refused, with pages of ``block`` tokens."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    found = []
    dtype = str(model.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", dtype):
        found.append(
            f"kv_cache_dtype {cache.cache_dtype} (valid: auto or {dtype}, the model's own; "
            "KAKEYA_RECIPE chooses the compression)"
        )
    if cache.user_specified_block_size and cache.block_size != block:
        found.append(f"block size {cache.block_size} (valid: {block}, the codec's block)")
    if getattr(cache, "prefix_match_unit", None) not in (None, block):
        found.append(
            f"prefix_match_unit {cache.prefix_match_unit} (valid: unset or {block}; a page "
            "cannot be copied in part)"
        )
    if cache.kv_sharing_fast_prefill:
        found.append("kv_sharing_fast_prefill")
    kinds = vllm_config.attention_config.backend_per_kind or {}
    if kinds and set(kinds) != {"full_attention"}:
        found.append(
            f"backend_per_kind for {', '.join(sorted(kinds))} (valid: full_attention only)"
        )
    return found


def _parallel_features(parallel: Any) -> list[str]:
    found = []
    if parallel.decode_context_parallel_size > 1:
        found.append("decode context parallelism (DCP)")
    if parallel.prefill_context_parallel_size > 1:
        found.append("prefill context parallelism (PCP)")
    if parallel.use_ubatching:
        found.append("micro-batching (enable_dbo, ubatch_size)")
    return found


def _hybrid_features(vllm_config: Any) -> list[str]:
    """What a model with attention layers and layers that keep a state does not do with KAKEYA."""
    if not hybrid.is_hybrid(vllm_config.model_config):
        return []
    found = []
    if windowed_layers(vllm_config.model_config.hf_text_config):
        found.append("a hybrid model with sliding-window layers")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        # A stage sees only its own states, and all stages have to agree on a block.
        found.append("a hybrid model with pipeline parallelism")
    if vllm_config.speculative_config is not None:
        found.append("a hybrid model with speculative decoding (not tried)")
    return found


def _replicated_heads(vllm_config: Any) -> list[str]:
    # kakeya_attend wants all query heads of a KV head in one call; a rank that shares its KV head
    # with another rank has only some of them.
    ranks = vllm_config.parallel_config.tensor_parallel_size
    heads = vllm_config.model_config.get_total_num_kv_heads()
    if ranks > heads:
        return [f"{ranks} tensor-parallel ranks for {heads} KV heads (valid: up to {heads})"]
    return []


def _speculative_features(vllm_config: Any) -> list[str]:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return []
    from kakeya_vllm.open_blocks import lookback_tokens

    if speculative.method in DRAFT_MODELS:
        if found := _draft_model_features(vllm_config):
            return found
    elif speculative.method not in MODEL_FREE_SPECULATION:
        valid = ", ".join((*MODEL_FREE_SPECULATION, *DRAFT_MODELS))
        return [f"speculative decoding with {speculative.method} (valid: {valid})"]
    drafts = speculative.num_speculative_tokens
    if drafts + 1 + lookback_tokens(vllm_config) > BLOCK_TOKENS:
        return [f"{drafts} speculative tokens (at most two blocks of a sequence may be open)"]
    return []


def _draft_model_features(vllm_config: Any) -> list[str]:

    attention = vllm_config.attention_config
    found = []
    models = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    if any(windowed_layers(x.hf_text_config) or x.get_sliding_window() for x in models):
        found.append("a draft model where either model has sliding-window layers (not tried)")
    # vLLM hands backend_per_kind on to the draft model, and does not hand on the backend.
    backends = [vllm_config.speculative_config.attention_backend]
    backends += (attention.backend_per_kind or {}).values()
    if any(register.is_ours(backend) for backend in backends):
        found.append(
            "KAKEYA for the layers of a draft model, which have no recipe (select it with "
            "--attention-backend, which is for the model only)"
        )
    return found


def check_impl(
    *,
    alibi_slopes: Any = None,
    sliding_window: Any = None,
    attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None,
    others: dict[str, Any] | None = None,
) -> None:
    """Raise UnsupportedFeature for what vLLM hands to an implementation of a layer."""
    found = []
    if alibi_slopes is not None:
        found.append("ALiBi")
    if sliding_window is not None:
        found.append(f"sliding-window attention (window {sliding_window})")
    if attn_type != "decoder":
        found.append(f"{attn_type} attention (encoder and cross attention)")
    if kv_sharing_target_layer_name is not None:
        found.append("layers that share another layer's KV cache")
    found.extend(f"the attention option {name}" for name, v in (others or {}).items() if v)
    if found:
        raise UnsupportedFeature(found)


def check_layer(layer: Any) -> None:
    """Raise UnsupportedFeature for what only a finished vLLM attention layer shows."""
    found = []
    if layer.head_size_v != layer.head_size:
        found.append(
            f"value heads of another size than key heads ({layer.head_size_v}, {layer.head_size})"
        )
    if layer_index(layer.layer_name) is None:
        found.append("attention layers whose name does not hold exactly one layer number")
    if found:
        raise UnsupportedFeature(found, layer.layer_name)
