"""Pages of an exact input through the installed package, as digests: a wheel has to seal what
every build seals. Run by itself it prints them as JSON (test_wheel.py does, in a fresh
environment); test_golden.py compares them with the committed ones."""

from __future__ import annotations

import hashlib
import json
import sys
from ctypes import sizeof

import numpy as np
from kakeya_vllm import lib

HEADS, LAYERS = 2, 2
RECIPES = ("kakeya-free-4.6x", "kakeya-free-4.6x-trellis")
HEAD_DIMS = (64, 128)


def rows(head_dim: int, seed: int) -> np.ndarray:
    """K or V of a block, float32 [128][HEADS][head_dim]: multiples of 2^-6 from a 64-bit linear
    congruential generator, so that no library's arithmetic is in them."""
    shape = (lib.BLOCK_TOKENS, HEADS, head_dim)
    out = np.empty(shape, np.float32)
    state = seed
    for i in range(out.size):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.flat[i] = ((state >> 40) % 512 - 256) / 64 + i % head_dim % 7
    return out


def digests() -> dict[str, str]:
    """SHA-256 of the pages of one block, for each recipe and head dimension; opened again as well,
    and refused where the rows that come back are nowhere near."""
    found = {}
    library = lib.load()
    for head_dim in HEAD_DIMS:
        model = {
            "num_layers": LAYERS,
            "num_kv_heads": HEADS,
            "num_q_heads": HEADS,
            "head_dim": head_dim,
            "max_position": 4096,
            "rope": None,
        }
        k, v = rows(head_dim, 1), rows(head_dim, 2)
        for recipe in RECIPES:
            codec = library.codec(recipe, model)
            size = codec.page_bytes(1)
            pages = np.zeros((HEADS, size), np.uint8)
            strides = {
                f"{x}_{y}_stride": n
                for x in "kv"
                for y, n in zip(("token", "head"), (HEADS * head_dim, head_dim), strict=True)
            }
            args = lib.SealArgs(
                struct_size=sizeof(lib.SealArgs),
                layer=1,
                num_heads=HEADS,
                dtype=lib.DTYPE_F32,
                block_index=3,
                k=k.ctypes.data,
                v=v.ctypes.data,
                pages=pages.ctypes.data,
                page_head_stride=size,
                **strides,
            )
            codec.seal(args)
            for head in range(HEADS):
                opened = [np.empty((lib.BLOCK_TOKENS, head_dim), np.float32) for _ in "kv"]
                codec.open(
                    1,
                    head,
                    pages[head].ctypes.data,
                    size,
                    opened[0].ctypes.data,
                    opened[1].ctypes.data,
                    opened[0].size,
                )
                for raw, back in zip((k, v), opened, strict=True):
                    error = np.square(back - raw[:, head]).mean() / np.var(raw[:, head])
                    assert error < 0.2, (recipe, head_dim, head, error)
            found[f"{recipe} d{head_dim}"] = hashlib.sha256(pages.tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    library = lib.load()
    json.dump(
        {
            "library": str(library.path),
            "simd": library.simd,
            "archs": library.cuda_archs,
            "version": library.version,
            "pages": digests(),
        },
        sys.stdout,
    )
