"""The bytes of a coded block: one slot after the layout of the seed's vLLM backend.

| field | bytes |
|---|---|
| header: "KK13"; rank, k, bits, outliers, metric (u32); seed (u64); k of level 2 (u32) | 48 |
| basis, mean (absent where a basis is shared: then once, beside the slots) | (rank + 1) d w |
| centres of both levels | (k1 + k2) rank w |
| choice of every row, packed to log2 k bits, each level | ceil(n log2 k / 8) |
| t, each level; norm | 2 n each |
| scalar codes, packed | ceil(n L b / 8) |
| with a threshold: outliers of a row (u16); place (u16) and value (f16) of each | 2 n + 4 m |

w is 2 for a float16 skeleton and 4 for float32; L the next power of two of the rank; m the outliers
that there are or, with an ``outlier_budget``, ceil(budget n L) whatever there are. Little-endian.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np
import torch

from kakeya_vllm.seed.recipe import METRICS, StreamRecipe
from kakeya_vllm.seed.scalar import pack_bits, unpack_bits

if TYPE_CHECKING:
    from kakeya_vllm.seed.codec import Encoded

MAGIC = b"KK13"
HEADER = struct.Struct("<4s5IQI")  # the rest up to HEADER_BYTES is zero
HEADER_BYTES = 48


class OutlierBudget(RuntimeError):
    """More outliers than the slots' fixed size has room for."""


def _width(recipe: StreamRecipe) -> int:
    return 2 if recipe.skeleton_dtype == "float16" else 4


def basis_bytes(recipe: StreamRecipe, rank: int, d: int) -> int:
    """Of a basis and its mean."""
    return (rank + 1) * d * _width(recipe)


def outlier_room(recipe: StreamRecipe, n: int, length: int, outliers: int) -> int:
    """Entries of a slot's side list; OutlierBudget if there are more than its budget."""
    if recipe.outlier_budget is None:
        return outliers
    room = math.ceil(recipe.outlier_budget * n * length)
    if outliers > room:
        raise OutlierBudget(
            f"{outliers} outliers in a block whose budget of {recipe.outlier_budget:.0%} is {room}"
        )
    return room


def slot_bytes(
    recipe: StreamRecipe, *, n: int, d: int, rank: int, length: int, outliers: int = 0
) -> int:
    """Of one block, without a basis that it shares."""
    size = HEADER_BYTES + 2 * n + math.ceil(n * length * recipe.bits / 8)
    if not recipe.share_basis:
        size += basis_bytes(recipe, rank, d)
    for k in filter(None, (recipe.clusters, recipe.second_clusters)):
        size += k * rank * _width(recipe) + math.ceil(n * int(math.log2(k)) / 8) + 2 * n
    if recipe.outlier_threshold is not None:
        size += 2 * n + 4 * outlier_room(recipe, n, length, outliers)
    return size


def sizes(recipe: StreamRecipe, encoded: Encoded, d: int) -> list[int]:
    """Bytes of each block's slot; the first of blocks with one basis also carries its bytes."""
    n = encoded.norm.shape[1]
    counts = [0] * len(encoded.length)
    if encoded.outlier is not None:
        counts = encoded.outlier.sum((1, 2)).tolist()
    ranks = encoded.basis.rank.tolist()
    found = []
    for i, (rank, length, count) in enumerate(
        zip(ranks, encoded.length.tolist(), counts, strict=True)
    ):
        size = slot_bytes(recipe, n=n, d=d, rank=rank, length=length, outliers=count)
        if recipe.share_basis and i % encoded.shared == 0:
            size += basis_bytes(recipe, rank, d)
        found.append(size)
    return found


def pack(recipe: StreamRecipe, encoded: Encoded, block: int, metric: str = "mse") -> bytes:
    """The slot of one of the blocks."""
    rank, length = int(encoded.basis.rank[block]), int(encoded.length[block])
    d = encoded.basis.mean.shape[1]
    float_type = "<f2" if recipe.skeleton_dtype == "float16" else "<f4"

    def floats(x: torch.Tensor, kind: str = "<f2") -> bytes:
        return x.cpu().numpy().astype(kind).tobytes()

    n = encoded.norm.shape[1]
    mask = None if encoded.outlier is None else encoded.outlier[block, :, :length].cpu().numpy()
    total = 0 if mask is None else int(mask.sum())
    second = recipe.second_clusters
    fields = (rank, recipe.clusters, recipe.bits, total, METRICS.index(metric))
    parts = [HEADER.pack(MAGIC, *fields, recipe.seed, second).ljust(HEADER_BYTES, b"\0")]
    if not recipe.share_basis:
        parts.append(floats(encoded.basis.rows[block, :rank], float_type))
        parts.append(floats(encoded.basis.mean[block], float_type))
    parts += [floats(level.centres[block, :, :rank], float_type) for level in encoded.levels]
    for level in encoded.levels:
        bits = int(math.log2(level.centres.shape[1]))
        parts.append(pack_bits(level.chosen[block].cpu().numpy(), bits))
    parts += [floats(level.t[block]) for level in encoded.levels]
    parts.append(floats(encoded.norm[block]))
    parts.append(pack_bits(encoded.indices[block, :, :length].cpu().numpy(), recipe.bits))
    if mask is not None:
        room = outlier_room(recipe, n, length, total)
        entries = np.zeros(room, dtype=[("place", "<u2"), ("value", "<f2")])
        entries["place"][:total] = np.nonzero(mask)[1]
        entries["value"][:total] = encoded.exact[block, :, :length].cpu().numpy()[mask]
        parts += [mask.sum(1).astype("<u2").tobytes(), entries.tobytes()]
    slot = b"".join(parts)
    assert len(slot) == slot_bytes(recipe, n=n, d=d, rank=rank, length=length, outliers=total)
    return slot


def packed_bytes(recipe: StreamRecipe, data: bytes, n: int, d: int) -> int:
    """Bytes of the slot that ``data`` begins with, by its header; ValueError if it is none."""
    magic, rank, _, _, total, *_ = HEADER.unpack_from(data)
    if magic != MAGIC or not 1 <= rank <= d:
        raise ValueError(f"no slot: magic {magic}, rank {rank}")
    length = 1 << (rank - 1).bit_length()
    return slot_bytes(recipe, n=n, d=d, rank=rank, length=length, outliers=total)


def unpack(recipe: StreamRecipe, slot: bytes, n: int, d: int, basis=None) -> Encoded:
    """One block from its slot; ValueError if the slot is not one of this recipe.

    ``basis``: the pca.Basis of one block, where it is shared.
    """
    from kakeya_vllm.seed.codec import Encoded, Level
    from kakeya_vllm.seed.pca import Basis

    magic, rank, k, bits, total, _metric, seed, second = HEADER.unpack_from(slot)
    have = (magic, k, bits, seed, second)
    want = (MAGIC, recipe.clusters, recipe.bits, recipe.seed, recipe.second_clusters)
    if have != want:
        raise ValueError(f"a slot with (magic, k, bits, seed, k of level 2) {have}, not {want}")
    length = 1 << (rank - 1).bit_length()
    size = slot_bytes(recipe, n=n, d=d, rank=rank, length=length, outliers=total)
    if len(slot) != size:
        raise ValueError(f"a slot of {len(slot)} bytes; its header says {size}")
    at = HEADER_BYTES

    def take(kind: str, *shape: int) -> np.ndarray:
        nonlocal at
        count = math.prod(shape)
        found = np.frombuffer(slot, kind, count, at).reshape(shape)
        at += found.nbytes
        return found

    def floats(kind: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(take(kind, *shape).astype(np.float32))[None]

    def codes(width: int, count: int) -> torch.Tensor:
        data = take("u1", math.ceil(count * width / 8)).tobytes()
        return torch.from_numpy(unpack_bits(data, width, count))

    kind = "<f2" if recipe.skeleton_dtype == "float16" else "<f4"
    if not recipe.share_basis:
        rows = floats(kind, rank, d)
        basis = Basis(floats(kind, d), rows, torch.tensor([rank]))
    ks = [k for k in (recipe.clusters, recipe.second_clusters) if k]
    centres = [floats(kind, k, rank) for k in ks]
    chosen = [codes(int(math.log2(k)), n).long()[None] for k in ks]
    levels = [Level(*parts, floats("<f2", n)) for parts in zip(centres, chosen, strict=True)]
    norm = floats("<f2", n)
    indices = codes(recipe.bits, n * length).reshape(1, n, length)
    outlier = exact = None
    if recipe.outlier_threshold is not None:
        rows_of = np.repeat(np.arange(n), take("<u2", n))
        entries = take(np.dtype([("place", "<u2"), ("value", "<f2")]), total)
        outlier, exact = torch.zeros(1, n, length, dtype=torch.bool), torch.zeros(1, n, length)
        places = rows_of, entries["place"].astype(np.int64)
        outlier[0][places] = True
        exact[0][places] = torch.from_numpy(entries["value"].astype(np.float32))
    return Encoded(basis, levels, norm, torch.tensor([length]), indices, outlier, exact)
