"""Hybrid models: some layers keep a state of fixed size instead of K and V of every token (state
space, linear attention, short convolution). The attention layers are compressed, the states stay.

vLLM draws states and blocks from one pool, so a block takes as many bytes as a state: 128 tokens
become many times 128. It finds that number as state bytes / bytes of one token, which is no whole
number for pages. Here a block is the fewest whole pages that a state fits into, and vLLM hands the
backend each page as a block of its own (its kernel blocks).
"""

from __future__ import annotations

import math
from typing import Any

from kakeya_vllm import config, lib, register


def is_hybrid(model_config: Any) -> bool:
    """Whether the model has attention layers and layers that keep a state."""
    return bool(model_config.is_hybrid) and not model_config.is_attention_free


# Kinds of layers as configs have them, by transformers or vLLM.
_ATTENTION = ("full_attention", "attention")
_WINDOWED = ("sliding_attention", "chunked_attention")
_BOTH = "hybrid"  # attention and a state in one layer


def keeps_states(text_config: Any) -> bool:
    """Whether a config (of transformers, where there is no engine) names layers with a state."""
    return any(kind not in (*_ATTENTION, *_WINDOWED) for kind in _kinds(text_config))


def count_attention_layers(text_config: Any, total: int) -> int:
    """Of the ``total`` layers of a hybrid model those with attention. (vLLM's own count knows one
    name a model type, and misses those whose config transformers has renamed.)"""
    kinds = _kinds(text_config)
    return sum(kind in (*_ATTENTION, _BOTH) for kind in kinds) if kinds else total


def _kinds(text_config: Any) -> list[str]:
    """Kinds of the layers in order, empty where the config does not tell them apart."""
    kinds = getattr(text_config, "layer_types", None)
    return list(kinds or getattr(text_config, "layers_block_type", None) or ())


def aligns(vllm_config: Any) -> bool:
    """Whether the blocks of this engine are chosen here and not by vLLM's platform."""
    return (
        vllm_config.model_config is not None
        and register.is_selected(vllm_config)
        and is_hybrid(vllm_config.model_config)
    )


def align(vllm_config: Any) -> None:
    """Choose the tokens of a block, and let a state take as many bytes. Once a process, after the
    layers are made and before vLLM asks them for their specs."""
    from kakeya_vllm.impl import KakeyaImpl

    cache = vllm_config.cache_config
    layers = vllm_config.compilation_config.static_forward_context.values()
    ours = [layer for layer in layers if isinstance(getattr(layer, "impl", None), KakeyaImpl)]
    cache.mamba_page_size_padded = None  # or the states would say what they were padded to before
    states = [(x, spec) for x in layers if (spec := _state_spec(x, vllm_config)) is not None]
    if not ours or not states:
        return
    recipe = config.from_vllm(vllm_config).recipe
    page = lib.load().recipe_page_bytes(recipe, ours[0].head_size) * ours[0].num_kv_heads
    pages = math.ceil(max(spec.page_size_bytes for _, spec in states) / page)
    if cache.mamba_cache_mode == "align":
        # A kernel may leave a state in the middle of a prompt, where its own chunks end.
        chunks = math.lcm(lib.BLOCK_TOKENS, *(_chunk(*state) for state in states))
        unit = chunks // lib.BLOCK_TOKENS
        pages = math.ceil(pages / unit) * unit
    cache.block_size = pages * lib.BLOCK_TOKENS
    cache.mamba_page_size_padded = pages * page
    if cache.mamba_cache_mode == "align":  # states are kept where blocks end
        cache.mamba_block_size = cache.block_size


def _state_spec(layer: Any, vllm_config: Any) -> Any:
    """The spec of a layer that keeps a state, None for any other."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    return layer.get_kv_cache_spec(vllm_config) if isinstance(layer, MambaBase) else None


def _chunk(layer: Any, spec: Any) -> int:
    """Tokens that a layer's kernel takes at a time, where blocks have to respect it."""
    own = getattr(layer, "get_prefill_checkpoint_alignment", None)
    if own is not None:  # vLLM 0.33, where the spec's own is that of a block
        return own() or 1
    return spec.prefill_checkpoint_alignment or 1


def is_state(spec: Any) -> bool:
    """Whether a KV-cache spec is of a state."""
    from vllm.v1.kv_cache_interface import MambaSpec

    return isinstance(spec, MambaSpec)
