"""Keys that a loaded model makes of the same tokens at several positions.

How a model turns its keys is told by no config: a layer may hold a rotary module and not apply it
(full-attention layers of Cohere 2 and EXAONE 4), or be turned by code that is not vLLM's. So the
model runs once on a few tokens, eagerly, and what its attention layers are given is kept. While it
does, attention and state-space layers answer zeros: then a token's hidden states, and its keys but
for their rotation, are the same at all positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kakeya_vllm.support import UnsupportedFeature

# The first is where nothing is turned; the others tell frequencies apart that differ by 1e-4.
POSITIONS = (0, 1, 2, 5, 17, 100, 1000, 3001)
# Two, in case that the embedding of one is zero.
TOKENS = 2


@dataclass(frozen=True)
class Keys:
    """``layers``: by name, [samples, len(positions), KV heads, head_dim] of float64 on the CPU,
    samples being tokens times calls of the layer. ``positions`` begins with 0."""

    positions: list[int]
    layers: dict[str, torch.Tensor]


def keys(model: torch.nn.Module, layer_names: list[str], vllm_config: Any) -> Keys:
    """Run the model and return what the named attention layers were given.

    A collective call where ranks work together. Raises UnsupportedFeature if the model cannot be
    run so, or has layers that were given no keys.
    """
    config = vllm_config.model_config
    longest = min(
        config.max_model_len,
        getattr(config.hf_text_config, "max_position_embeddings", None) or config.max_model_len,
    )
    positions = [min(position, longest - 1) for position in POSITIONS]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layer_names}
    try:
        with _layers_replaced(model, seen), torch.inference_mode():
            _run(model, positions, vllm_config)
    except Exception as error:
        raise UnsupportedFeature(
            [f"a model whose keys cannot be looked at ({type(error).__name__}: {error})"]
        ) from error
    shape = (-1, len(positions))
    return Keys(
        positions,
        {
            name: torch.cat([k.unflatten(0, shape) for k in calls]) if calls else torch.empty(0)
            for name, calls in seen.items()
        },
    )


def _run(model: torch.nn.Module, positions: list[int], vllm_config: Any) -> None:
    from vllm.distributed import get_pp_group
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.models.interfaces import (
        requires_raw_input_tokens,
        supports_multimodal,
    )

    config = vllm_config.model_config
    device = vllm_config.device_config.device
    vocabulary = config.get_vocab_size()
    chosen = torch.tensor([vocabulary // 3, vocabulary // 2], device=device)
    ids = chosen.repeat_interleave(len(positions))
    places = torch.tensor(positions, device=device).repeat(TOKENS)
    if getattr(model, "lora_manager", None) is not None:
        from vllm.lora.layers import LoRAMapping

        # No adapter for any token, which its layers must have been told before they run.
        model.lora_manager.set_adapter_mapping(LoRAMapping((0,) * len(ids), (0,), is_prefill=True))
    inputs: dict[str, Any] = {"input_ids": ids, "inputs_embeds": None, "intermediate_tensors": None}
    with set_forward_context(None, vllm_config, num_tokens=len(ids), skip_compiled=True):
        if not get_pp_group().is_first_rank:
            # As if from the stage before: any rows will do that are the same at all positions.
            empty = model.make_empty_intermediate_tensors(len(ids), config.dtype, device)
            generator = torch.Generator().manual_seed(0)
            for tensor in empty.tensors.values():
                rows = torch.randn(TOKENS, *tensor.shape[1:], generator=generator)
                tensor.copy_(rows.repeat_interleave(len(positions), 0))
            inputs |= {"input_ids": None, "intermediate_tensors": empty}
        elif supports_multimodal(model):
            inputs["inputs_embeds"] = model.embed_input_ids(ids)
            if not requires_raw_input_tokens(model):
                inputs["input_ids"] = None
        model(positions=places, **inputs)


@contextlib.contextmanager
def _layers_replaced(model: torch.nn.Module, seen: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Let all layers with a cache or a state answer zeros, and those of ``seen`` keep their keys:
    [tokens, KV heads, head_dim] a call, float64 on the CPU."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    before: list[tuple[torch.nn.Module, Any]] = []
    try:
        for module in model.modules():
            if not isinstance(module, AttentionLayerBase):
                continue
            before.append((module, module.__dict__.get("forward")))
            if isinstance(module, MambaBase):
                module.forward = _state
            else:
                module.forward = _attention(module, seen.get(module.layer_name))
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _attention(layer: Any, kept: list[torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    def forward(
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output_shape: Any = None,
        output_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if kept is not None and key is not None:
            kept.append(key.reshape(-1, layer.num_kv_heads, layer.head_size).double().cpu())
        width = layer.num_heads * layer.head_size_v
        shape = (*query.shape[:1], width) if output_shape is None else output_shape
        return query.new_zeros(shape, dtype=output_dtype or query.dtype)

    return forward


def _state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Zeros as a state-space layer answers them: in ``output`` if it is given, else returned."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    hidden = kwargs.get("hidden_states", given[0])
    output = kwargs.get("output", given[1] if len(given) > 1 else None)
    if output is not None and output.shape == hidden.shape:
        return output.zero_()
    return torch.zeros_like(hidden)
