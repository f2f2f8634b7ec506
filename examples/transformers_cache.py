"""KAKEYA outside vLLM: a cache for `transformers`, over the C ABI.

    python examples/transformers_cache.py MODEL "The capital of France is" --calibration FILE

Every block of 128 tokens is sealed into one page a KV head (kakeya_seal); each call opens the pages
again (kakeya_open) and hands the model dense keys and values, as its attention wants them. So the
cache between calls is small, and the example is the shortest correct use of sealing and opening; it
is slow, because nothing attends over pages here (kakeya_attend does, and the vLLM backend).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from kakeya_vllm import lib
from transformers.cache_utils import Cache, DynamicLayer

BLOCK = lib.BLOCK_TOKENS
DTYPES = {
    torch.bfloat16: lib.DTYPE_BF16,
    torch.float16: lib.DTYPE_F16,
    torch.float32: lib.DTYPE_F32,
}


def codec_for(model: Any, recipe: str, calibration: bytes | None = None) -> lib.Codec:
    """The codec of a Llama-like transformers model: its shape and its rotary angles."""
    config = model.config.get_text_config()
    rotary = model.get_decoder().rotary_emb
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    angles = rotary.inv_freq.double().tolist()
    shape = {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": config.num_key_value_heads,
        "num_q_heads": heads,
        "head_dim": head_dim,
        "max_position": config.max_position_embeddings,
        # Llama's rotation pairs the halves of a head's channels.
        "rope": {"rotary_dim": 2 * len(angles), "interleaved": False, "inv_freq": angles},
    }
    return lib.load().codec(recipe, shape, calibration)


class PageLayer(DynamicLayer):
    """One layer: sealed pages of full blocks, and the tokens of the block that is still filling."""

    is_croppable = False

    def __init__(self, codec: lib.Codec, layer: int) -> None:
        super().__init__()
        self.codec, self.layer = codec, layer
        self.page_bytes = codec.page_bytes(layer)
        self.pages: list[torch.Tensor] = []  # uint8 [batch, KV heads, page], one a block

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values [batch, KV heads, tokens, D] of a step; gives back those of
        all tokens: pages for what was sealed before, everything else as it is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = (
            torch.cat((old, new), dim=-2) if old.numel() else new
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        opened = [self._open(page, key_states) for page in self.pages]
        dense = tuple(
            torch.cat([block[stream] for block in opened] + [raw], dim=-2)
            for stream, raw in enumerate((keys, values))
        )
        while keys.shape[-2] >= BLOCK:
            self._seal(keys[..., :BLOCK, :], values[..., :BLOCK, :])
            keys, values = keys[..., BLOCK:, :], values[..., BLOCK:, :]
        # Clones, so that what was sealed is not kept alive behind a slice.
        self.keys, self.values = keys.clone(), values.clone()
        return dense

    def get_seq_length(self) -> int:
        rest = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return BLOCK * len(self.pages) + rest

    def reset(self) -> None:
        self.pages = []
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a sealed page cannot be cropped")

    @property
    def nbytes(self) -> int:
        """Bytes that are kept between calls."""
        raw = (self.keys, self.values) if self.is_initialized else ()
        return sum(x.nbytes for x in (*self.pages, *raw))

    def _seal(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [batch, KV heads, 128, D] as the pages of the next block."""
        batch, heads = keys.shape[:2]
        pages = torch.empty(batch, heads, self.page_bytes, dtype=torch.uint8)
        keys, values = keys.contiguous().cpu(), values.contiguous().cpu()
        for i in range(batch):
            k, v = keys[i], values[i]
            args = lib.SealArgs(
                layer=self.layer,
                num_heads=heads,
                dtype=DTYPES[k.dtype],
                block_index=len(self.pages),
                k=k.data_ptr(),
                v=v.data_ptr(),
                k_token_stride=k.stride(1),
                k_head_stride=k.stride(0),
                v_token_stride=v.stride(1),
                v_head_stride=v.stride(0),
                pages=pages[i].data_ptr(),
                page_head_stride=self.page_bytes,
            )
            self.codec.seal(args)
        self.pages.append(pages)

    def _open(self, pages: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's keys and values [batch, KV heads, 128, D] in the type and place of ``like``."""
        batch, heads, head_dim = pages.shape[0], pages.shape[1], like.shape[-1]
        out = torch.empty(2, batch, heads, BLOCK, head_dim)
        for i in range(batch):
            for head in range(heads):
                self.codec.open(
                    self.layer,
                    head,
                    pages[i, head].data_ptr(),
                    self.page_bytes,
                    out[0, i, head].data_ptr(),
                    out[1, i, head].data_ptr(),
                    BLOCK * head_dim,
                )
        keys, values = out.to(device=like.device, dtype=like.dtype)
        return keys, values


class KakeyaCache(Cache):
    """``model.generate(..., past_key_values=KakeyaCache(model))``. Sequences of a batch must begin
    at position 0: padding on the left would move positions, which pages are made for."""

    def __init__(
        self, model: Any, recipe: str = "kakeya-free-4.6x", calibration: bytes | None = None
    ) -> None:
        codec = codec_for(model, recipe, calibration)
        layers = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[PageLayer(codec, i) for i in range(layers)])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or name of a Llama-like model")
    parser.add_argument("prompt")
    parser.add_argument("--recipe", help="default: kakeya-4.6x with an artefact, else free")
    parser.add_argument("--calibration", help="artefact of `kakeya calibrate MODEL`")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    calibration = None
    if args.calibration:
        with open(args.calibration, "rb") as file:
            calibration = file.read()
    recipe = args.recipe or ("kakeya-4.6x" if calibration else "kakeya-free-4.6x")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    inputs = tokenizer(args.prompt, return_tensors="pt")
    for cache in (DynamicCache(), KakeyaCache(model, recipe, calibration)):
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=args.tokens, do_sample=False, past_key_values=cache
            )
        size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        size = cache.nbytes if isinstance(cache, KakeyaCache) else size
        print(f"{type(cache).__name__}, {size / 2**20:.2f} MiB for {cache.get_seq_length()} tokens")
        print(tokenizer.decode(ids[0], skip_special_tokens=True), "\n")


if __name__ == "__main__":
    main()
