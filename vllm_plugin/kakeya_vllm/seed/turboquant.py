"""Codecs of single rows: TurboQuant's presets, and the comparators of the seed's later work.

A row is one head's key or value of one token; nothing is shared between rows, so a token can be
coded when it comes. "lloyd-max": unit length, Hadamard rotation, Gaussian Lloyd-Max codes, the
length in f16; with norm correction the decoded row has exactly that length (vLLM's ``_nc``).
"uniform": an even grid between the row's least and largest value, f16 step and f16 least, which is
how vLLM's presets keep values. "fp8": e4m3 as it is. "absmax": rotated, an even grid with
2^(bits-1) - 1 steps up to the largest magnitude, which the lattice codecs were compared with.
"""

from __future__ import annotations

import math

import torch

from kakeya_vllm.seed import lattice
from kakeya_vllm.seed.recipe import StreamRecipe
from kakeya_vllm.seed.scalar import GAUSSIAN, nearest
from kakeya_vllm.seed.transform import rotate, unrotate

_SMALL = 1e-30
FP8_MAX = 448.0


def row_bits(recipe: StreamRecipe, d: int) -> int:
    """Stored bits of a row of ``d`` coordinates."""
    if recipe.codec in lattice.DIMENSION:
        return lattice.bits_per_row(recipe.codec, recipe.q, d)
    if recipe.codec == "noise":
        return 16 * d  # nothing is compressed
    # Beside the codes: a norm; a step and a least value; nothing; a norm and a largest value.
    extra = {"lloyd-max": 16, "uniform": 32, "fp8": 0, "absmax": 32}[recipe.codec]
    bits = 8 if recipe.codec == "fp8" else recipe.bits
    return 8 * math.ceil(d * bits / 8) + extra


def round_trip(x: torch.Tensor, recipe: StreamRecipe) -> torch.Tensor:
    """Float32 rows [..., d] as their codes give them back."""
    if recipe.codec in lattice.DIMENSION:
        return lattice.round_trip(x, recipe.codec, recipe.q, recipe.seed)
    return _CODECS[recipe.codec](x, recipe)


def _lloyd_max(x: torch.Tensor, recipe: StreamRecipe) -> torch.Tensor:
    d = x.shape[-1]
    norm = x.norm(dim=-1, keepdim=True)
    z = rotate(x / norm.clamp_min(_SMALL), recipe.seed)
    table = torch.tensor(GAUSSIAN[recipe.bits], dtype=torch.float32, device=x.device)
    z = table[nearest(z, table).long()]
    # Levels have the root mean square of a row's coordinates, sqrt d times a unit row's.
    length = z.norm(dim=-1, keepdim=True) if recipe.norm_correction else d**0.5
    return unrotate(z * d**0.5, recipe.seed) * (norm.half().float() / length)


def _uniform(x: torch.Tensor, recipe: StreamRecipe) -> torch.Tensor:
    steps = (1 << recipe.bits) - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / steps).half().float().clamp_min(2.0**-24)
    low = low.half().float()
    return ((x - low) / step).round().clamp(0, steps) * step + low


def _fp8(x: torch.Tensor, _recipe: StreamRecipe) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _absmax(x: torch.Tensor, recipe: StreamRecipe) -> torch.Tensor:
    levels, d = (1 << (recipe.bits - 1)) - 1, x.shape[-1]
    norm = x.norm(dim=-1, keepdim=True).half().float()
    y = rotate(x / norm.clamp_min(_SMALL), recipe.seed) / d**0.5
    largest = y.abs().amax(-1, keepdim=True).half().float().clamp_min(2.0**-14)
    y = (y * (levels / largest)).round().clamp(-levels, levels) * (largest / levels)
    return unrotate(y * d**0.5, recipe.seed) * norm


_CODECS = {"lloyd-max": _lloyd_max, "uniform": _uniform, "fp8": _fp8, "absmax": _absmax}
