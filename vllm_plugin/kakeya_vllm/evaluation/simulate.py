"""Compression inside the stock engine: hooks that give attention what a page would give back.

The real backend compresses K and V of all its layers together, once a block is full. To look at one
stream, one layer, or another moment, an engine with vLLM's own attention is used instead, and hooks
on its attention layers replace keys and values by what the codec makes of them, sealed and opened
again and rounded to the model's dtype.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

from kakeya_vllm import config, engine, lib
from kakeya_vllm.cuda import DTYPES as DEVICE_DTYPES
from kakeya_vllm.evaluation.metrics import LayerErrors

BLOCK = lib.BLOCK_TOKENS
DTYPES = DEVICE_DTYPES | {torch.float32: lib.DTYPE_F32}


class PageCoder:
    """Seals and opens with a codec, block by block."""

    def __init__(self, codec: lib.Codec) -> None:
        self.codec = codec

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [tokens, heads, D] as attention gets them, of a sequence's first tokens: the
        first ``blocks`` blocks as pages give them back, in the same dtype and on the same device;
        the rest as it is."""
        size, heads, dim = self.codec.page_bytes(layer), k.shape[1], k.shape[2]
        k_rows, v_rows = (x[: blocks * BLOCK].contiguous().cpu() for x in (k, v))
        pages = torch.empty(heads, size, dtype=torch.uint8)
        k_out, v_out = (torch.empty(heads, BLOCK, dim) for _ in "kv")
        args = lib.SealArgs(
            ctypes.sizeof(lib.SealArgs), layer, 0, heads, DTYPES[k.dtype], 0, 0, 0, *(0,) * 6
        )
        args.k_token_stride = args.v_token_stride = heads * dim
        args.k_head_stride = args.v_head_stride = dim
        args.pages, args.page_head_stride = pages.data_ptr(), size
        k_new, v_new = k.clone(), v.clone()
        for block in range(blocks):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            args.block_index = block
            args.k, args.v = k_rows[rows].data_ptr(), v_rows[rows].data_ptr()
            self.codec.seal(args)
            for head in range(heads):
                places = (x[head].data_ptr() for x in (k_out, v_out))
                self.codec.open(layer, head, pages[head].data_ptr(), size, *places, BLOCK * dim)
            k_new[rows] = k_out.transpose(0, 1).to(k)
            v_new[rows] = v_out.transpose(0, 1).to(v)
        return k_new, v_new


class Coder(PageCoder):
    """The codec that an engine with the same settings would use."""

    def __init__(self, llm: Any, model: Any, recipe: str | None) -> None:
        from kakeya_vllm.runtime import make_codec

        vllm_config = llm.llm_engine.vllm_config
        chosen = {config.KEY: {"recipe": recipe}} if recipe else {}
        self.settings = config.resolve(chosen, vllm_config.model_config)
        names = [name for name, _ in engine.attention_layers(model)]
        super().__init__(make_codec(model, names, vllm_config, self.settings))


class Identity:
    """Stands in for a codec that loses nothing: rows go through float32 and back."""

    def round_trip(
        self, _layer: int, k: torch.Tensor, v: torch.Tensor, _blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return k.float().to(k.dtype, copy=True), v.float().to(v.dtype, copy=True)


class Hooks:
    """Pre-forward hooks on all attention layers.

    ``mode``: "observe" changes nothing and measures; "in-forward" codes the rows that a layer is
    about to use, so errors reach the layers above; "snapshot" keeps clean rows of one pass
    (``capture``) and uses their coded form in the next. Steps shorter than the prefix stay raw.
    """

    def __init__(
        self,
        model: Any,
        coder: Coder | Identity,
        mode: str,
        *,
        streams: str = "kv",
        layers: set[int] | None = None,
        prefix: int = engine.CHUNK,
        coded_tokens: int = engine.CHUNK,
    ) -> None:
        self.layers = engine.attention_layers(model)
        self.coder, self.mode, self.streams = coder, mode, streams
        self.chosen = set(range(len(self.layers))) if layers is None else layers
        self.prefix, self.blocks = prefix, coded_tokens // BLOCK
        self.errors = LayerErrors()
        self.capture = False
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.fired = 0

    @contextlib.contextmanager
    def attached(self):
        """The hooks are on the model for the length of a with block."""
        handles = [
            module.register_forward_pre_hook(self._hook(i, module), with_kwargs=True)
            for i, (_, module) in enumerate(self.layers)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int, module: Any):
        heads, dim = module.num_kv_heads, module.head_size
        names = ("query", "key", "value")

        def hook(_module, args, kwargs):
            values = dict(zip(names, args, strict=False)) | {
                n: kwargs[n] for n in names if n in kwargs
            }
            k, v = values["key"], values["value"]
            if k.shape[0] != self.prefix or index not in self.chosen:
                return None
            self.fired += 1
            rows = k.reshape(-1, heads, dim), v.reshape(-1, heads, dim)
            if self.mode == "snapshot" and not self.capture:
                new = self.kept.pop(index)
            else:
                new = self.coder.round_trip(index, *rows, self.blocks)
                self._measure(index, rows, new)
                if self.mode == "snapshot":
                    self.kept[index] = new
            if self.mode == "observe" or self.capture:
                return None
            values["key"] = new[0].reshape(k.shape) if "k" in self.streams else k
            values["value"] = new[1].reshape(v.shape) if "v" in self.streams else v
            return (
                tuple(values[n] for n in names[: len(args)]) + args[len(names) :],
                kwargs | {n: values[n] for n in names if n in kwargs},
            )

        return hook

    def _measure(self, index: int, rows: tuple, new: tuple) -> None:
        coded = slice(0, self.blocks * BLOCK)
        for stream, x, y in zip("kv", rows, new, strict=True):
            a, b = x[coded].double(), y[coded].double()
            self.errors.add(stream, index, float((a - b).square().sum()), float(a.square().sum()))
