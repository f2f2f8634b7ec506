"""Compression inside the stock engine: hooks that give attention what a page would give back.

The real backend compresses K and V of all its layers together, once a block is full. To look at one
stream, one layer, or another moment, an engine with vLLM's own attention is used instead, and hooks
on its attention layers replace keys and values by what the codec makes of them, sealed and opened
again and rounded to the model's dtype.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, ClassVar, Protocol

import torch

from kakeya_vllm import config, engine, lib
from kakeya_vllm.cuda import DTYPES as DEVICE_DTYPES
from kakeya_vllm.evaluation.metrics import LayerErrors

BLOCK = lib.BLOCK_TOKENS
RAW_BYTES = 2  # of an uncompressed value, in bf16
DTYPES = DEVICE_DTYPES | {torch.float32: lib.DTYPE_F32}


class RoundTrip(Protocol):
    """What hooks code with. ``stored``: bytes that the last call's rows would take, by stream ("k"
    and "v", or "kv" where one size is of both); nothing where that is not known."""

    stored: dict[str, int]

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class PageCoder:
    """Seals and opens with a codec, block by block."""

    def __init__(self, codec: lib.Codec) -> None:
        self.codec = codec
        # Bytes of the last call: pages, and two bytes a value of the rest.
        self.stored: dict[str, int] = {}

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
        # A page holds both streams, and its size says nothing of one of them.
        raw = (k.shape[0] - blocks * BLOCK) * heads * 2 * dim
        self.stored = {"kv": blocks * heads * size + RAW_BYTES * raw}
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

    def describe(self) -> dict[str, Any]:
        """What an evaluation's JSON says of the codec."""
        about = self.codec.describe()
        codec = {name: about.get(name) for name in ("name", "ratio", "quantizer", "fingerprint")}
        return codec | {"calibrated": self.settings.calibration is not None}


class Identity:
    """Stands in for a codec that loses nothing: rows go through float32 and back."""

    stored: ClassVar[dict[str, int]] = {}

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
        coder: RoundTrip,
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
        self.sizes = StoredBytes()

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
            chosen = index in self.chosen
            if k.shape[0] != self.prefix or not (chosen or self.mode == "snapshot"):
                return None
            self.fired += chosen
            if self.mode == "snapshot" and not self.capture:
                new = self.kept.pop(index)
            else:
                rows = k.reshape(-1, heads, dim), v.reshape(-1, heads, dim)
                new = self._coded(index, rows) if chosen else rows
                if self.mode == "snapshot":
                    # What stays uncompressed is kept too: computed again, above coded layers, it
                    # would be what errors below made of it.
                    self.kept[index] = tuple(x.clone() for x in new)
            if self.mode == "observe" or self.capture:
                return None
            values["key"], values["value"] = (
                x.reshape(old.shape) for x, old in zip(new, (k, v), strict=True)
            )
            return (
                tuple(values[n] for n in names[: len(args)]) + args[len(names) :],
                kwargs | {n: values[n] for n in names if n in kwargs},
            )

        return hook

    def _coded(self, index: int, rows: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer with the streams that are compressed coded; measured and counted."""
        new = self.coder.round_trip(index, *rows, self.blocks)
        self._measure(index, rows, new)
        self.sizes.add(index, self.coder.stored, self.streams, rows)
        return tuple(
            x if stream in self.streams else old
            for stream, x, old in zip("kv", new, rows, strict=True)
        )

    def stored(self) -> dict[str, float] | None:
        """Bytes a token that all layers' prefixes would take as coded, and their ratio to bf16;
        None where the coder does not say."""
        return self.sizes.figures(len(self.layers), self.prefix)

    def _measure(self, index: int, rows: tuple, new: tuple) -> None:
        coded = slice(0, self.blocks * BLOCK)
        for stream, x, y in zip("kv", rows, new, strict=True):
            a, b = x[coded].double(), y[coded].double()
            self.errors.add(stream, index, float((a - b).square().sum()), float(a.square().sum()))


class StoredBytes:
    """Sums of what coded layers would store, beside the same in bf16."""

    def __init__(self) -> None:
        self.coded: dict[int, list[int]] = {}
        self.raw = 0
        self.known = True

    def add(self, layer: int, stored: dict[str, int], streams: str, rows: tuple) -> None:
        """One passage's ``rows`` (K, V) of a layer, whose streams other than ``streams`` stay
        uncompressed."""
        raw = [x.numel() * RAW_BYTES for x in rows]
        self.raw = sum(raw)
        if streams == "kv" and stored:
            size = sum(stored.values())
        elif streams in stored:
            size = stored[streams] + raw["vk".index(streams)]
        else:
            self.known = False
            return
        self.coded.setdefault(layer, []).append(size)

    def figures(self, layers: int, prefix: int) -> dict[str, float] | None:
        """Of ``layers`` layers, those that were never coded in bf16; means over passages."""
        if not self.coded or not self.known:
            return None
        coded = sum(sum(sizes) / len(sizes) for sizes in self.coded.values())
        total = coded + self.raw * (layers - len(self.coded))
        return {"bytes_per_token": total / prefix, "ratio": self.raw * layers / total}
