"""Scalar quantisers with 1 to 4 bits: Lloyd-Max tables, fitted tables, bit packing.

A table holds 2^b ascending levels for values of mean square 1. The file form, ``.f32``, is these
levels as little-endian float32 and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

# Levels that minimise the squared error of N(0, 1), positive half; J. Max, 1960.
_POSITIVE = {
    1: (0.797885,),
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
BITS = tuple(_POSITIVE)
GAUSSIAN = {b: tuple(-x for x in reversed(half)) + half for b, half in _POSITIVE.items()}
# Values that a fit looks at, at most.
POOL = 5_000_000


def check_table(levels: Sequence[float], bits: int, source: str) -> tuple[float, ...]:
    """``levels`` as floats; ValueError unless there are 2^bits, finite and strictly ascending."""
    found = tuple(float(x) for x in levels)
    if len(found) != 1 << bits:
        raise ValueError(f"{source} has {len(found)} levels; {bits} bits need {1 << bits}")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{source} has a level that is not finite")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"{source}: its levels are not strictly ascending")
    return found


def read_table(path: str | Path, bits: int) -> tuple[float, ...]:
    """The table in a ``.f32`` file; ValueError says what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the table {path} cannot be read: {error}") from error
    if len(data) != 4 << bits:
        raise ValueError(f"{path} has {len(data)} bytes; {bits} bits need {4 << bits}")
    return check_table(np.frombuffer(data, "<f4").tolist(), bits, str(path))


def write_table(path: str | Path, levels: Sequence[float]) -> None:
    """The ``.f32`` file of a table."""
    Path(path).write_bytes(np.asarray(levels, "<f4").tobytes())


def nearest(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Uint8 index of each value's nearest level, the lower one of two equally near.

    Any cost that grows with the distance chooses the same level, the seed's squared error and its
    Huber cost ("linf") alike.
    """
    return torch.bucketize(z, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def lloyd(
    pool: torch.Tensor, start: Sequence[float], iterations: int = 200, tolerance: float = 1e-6
) -> tuple[float, ...]:
    """Lloyd's algorithm in one dimension: the table that ``start`` becomes on the values ``pool``.

    Stops when no level moves by more than ``tolerance``. A level without values stays.
    """
    values = pool.flatten().double().cpu()
    if len(values) > POOL:
        picks = torch.randint(len(values), (POOL,), generator=torch.Generator().manual_seed(0))
        values = values[picks]
    values = values.sort().values
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    levels = torch.tensor(start, dtype=torch.float64)
    for _ in range(iterations):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(values))])
        counts = ends.diff()
        moved = torch.where(counts > 0, sums[ends].diff() / counts.clamp_min(1), levels)
        done = bool((moved - levels).abs().max() <= tolerance)
        levels = moved
        if done:
            break
    return tuple(levels.float().tolist())


def table_error(pool: torch.Tensor, levels: Sequence[float]) -> float:
    """Mean squared error of the values ``pool`` in the nearest level."""
    table = torch.tensor(levels, dtype=torch.float32, device=pool.device)
    pool = pool.float()
    return float((table[nearest(pool, table).long()] - pool).double().square().mean())


def pack_bits(codes: np.ndarray, bits: int) -> bytes:
    """Codes below 2^bits, in the order of the array, as one stream with the lowest bit first.

    ceil(codes * bits / 8) bytes; a code may lie in two of them. ``bits`` 0 to 8.
    """
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1, 1)
    return np.packbits((flat >> np.arange(bits, dtype=np.uint8)) & 1, bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """The ``count`` codes, uint8, that :func:`pack_bits` wrote."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream.reshape(count, bits) * weights).sum(1).astype(np.uint8)
