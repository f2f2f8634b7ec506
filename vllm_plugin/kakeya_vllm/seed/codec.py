"""The block codec: PCA, K-means on the coefficients, a rotated residual in scalar codes.

A row x of a block becomes c = U (x - mean), of rank coefficients; c = t m + r with the centre m
that it goes along (t1 m1 + t2 m2 + r with two levels); r, padded with zeros to a power of two, is
rotated and scaled to mean square 1, and each coordinate is the index of a table's level. What the
rank leaves out is lost. Coordinates beyond a threshold also have their value in a side list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kakeya_vllm.seed import kmeans, pca, slots
from kakeya_vllm.seed.recipe import StreamRecipe
from kakeya_vllm.seed.scalar import GAUSSIAN, nearest, read_table
from kakeya_vllm.seed.transform import next_power_of_two, rotate, unrotate

_EPSILON = 1e-8
# Of Omega, so that it is not the sequence that gives the signs of the rotation.
SKETCH_SEED = 0x9E3779B97F4A7C15
SKELETON_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def _inside(z: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Bool [B, 1, L]: which coordinates of ``z`` [B, n, L] are of a block's own ``length`` [B]."""
    return torch.arange(z.shape[-1], device=z.device) < length[:, None, None]


class FieldOverflow(ValueError):
    """A value that a 16-bit field of a slot cannot hold."""


def to_half(x: torch.Tensor, field: str) -> torch.Tensor:
    """Float32 values rounded as their f16 field would hold them; FieldOverflow if one cannot."""
    rounded = x.half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise FieldOverflow(
            f"the {field} of a block reaches {float(x.abs().max()):.4g} and its f16 field holds up "
            "to 65504; valid are sigma_scale unit, or the layer among sigma_skip_layers"
        )
    return rounded


@dataclass
class Level:
    """One level of K-means: ``centres`` [B, k, r], and ``chosen`` int64, ``t`` float32 [B, n]."""

    centres: torch.Tensor
    chosen: torch.Tensor
    t: torch.Tensor

    def value(self) -> torch.Tensor:
        """t m, [B, n, r]."""
        index = self.chosen[..., None].expand(-1, -1, self.centres.shape[-1])
        return self.t[..., None] * self.centres.gather(1, index)


@dataclass
class Encoded:
    """B blocks of n rows as they would be stored, fields rounded to their types.

    ``length`` int64 [B]: coordinates of a block's codes, next_power_of_two(rank); ``indices`` uint8
    [B, n, L] with L the largest; ``outlier`` bool and ``exact`` float32 [B, n, L], None without a
    threshold; ``norm`` [B, n]. ``shared``: how many blocks in a row have one basis.
    """

    basis: pca.Basis
    levels: list[Level]
    norm: torch.Tensor
    length: torch.Tensor
    indices: torch.Tensor
    outlier: torch.Tensor | None
    exact: torch.Tensor | None
    shared: int = 1


class BlockCodec:
    """A recipe's codec of one stream.

    ``metric``: "mse", "inner_product" or "linf" where the recipe's is "auto". ``table``: levels for
    the recipe's bits where its table is "calibrated".
    """

    def __init__(
        self, recipe: StreamRecipe, metric: str = "mse", table: tuple[float, ...] | None = None
    ) -> None:
        self.recipe = recipe
        self.metric = metric if recipe.metric == "auto" else recipe.metric
        if recipe.table == "gaussian":
            levels = GAUSSIAN[recipe.bits]
        elif recipe.table == "calibrated":
            if table is None:
                raise ValueError("a recipe with a calibrated table needs that table")
            levels = table
        else:
            levels = read_table(recipe.table, recipe.bits)
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.dtype = SKELETON_DTYPES[recipe.skeleton_dtype]

    def encode(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> Encoded:
        """Code float32 blocks ``x`` [streams, B, n, d]; ``weights`` [streams, B, n], None: all 1.

        One basis a block, or one a stream where the recipe shares it.
        """
        basis, levels, norm, length, z = self._analyse(x, weights)
        stored = x.flatten(0, 1).norm(dim=-1) if self._unit() else norm
        outlier = exact = None
        if self.recipe.outlier_threshold is not None:
            outlier = (z.abs() > self.recipe.outlier_threshold) & _inside(z, length)
            exact = torch.where(outlier, to_half(z, "list of outliers"), 0)
        return Encoded(
            basis,
            levels,
            to_half(stored, "norm"),
            length,
            nearest(z, self.levels.to(x.device)),
            outlier,
            exact,
            x.shape[1] if self.recipe.share_basis else 1,
        )

    def residuals(self, x: torch.Tensor) -> torch.Tensor:
        """The values, of mean square 1, that the scalar codes of ``x`` [streams, B, n, d] are of:
        what a table is fitted on. Flat."""
        *_, length, z = self._analyse(x, None)
        return z[_inside(z, length).expand_as(z)]

    def _analyse(
        self, x: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[pca.Basis, list[Level], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Basis, levels, lengths of residuals [B, n], coordinates of each block's codes [B], and
        the values [B, n, L] that are to be quantised."""
        r = self.recipe
        streams, blocks, n, d = x.shape
        fit_on = x.reshape(streams, 1, blocks * n, d) if r.share_basis else x
        fit_weights = None if weights is None else weights.reshape(fit_on.shape[:3]).flatten(0, 1)
        basis = pca.fit(
            fit_on.flatten(0, 1),
            method=r.pca,
            variance_ratio=r.variance_ratio,
            target_rank=max(round(d * r.rank_factor), min(8, d)),
            oversample=r.oversample,
            power_iterations=r.power_iterations,
            rank_cap=r.rank_cap,
            weights=fit_weights,
            seed=(r.seed ^ SKETCH_SEED) & (2**63 - 1),
            dtype=self.dtype,
        )
        to_half(basis.mean, "mean")
        if r.share_basis:
            basis = basis.repeated(blocks)
        c = basis.project(x.flatten(0, 1))
        levels, rest = self._levels(c, None if weights is None else weights.flatten(0, 1))
        norm = rest.norm(dim=-1)
        lengths = [next_power_of_two(rank) for rank in basis.rank.tolist()]
        length = torch.tensor(lengths, device=x.device)
        return basis, levels, norm, length, self.scaled(rest, norm, length)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Float32 rows [B, n, d] from what is stored."""
        r, basis = self.recipe, encoded.basis
        z = self._quantised(encoded)
        rest = z.new_zeros(*z.shape[:2], basis.rows.shape[1])
        for length in encoded.length.unique().tolist():
            of = encoded.length == length
            part = z[of][..., :length]
            back = unrotate(part, r.seed) if r.rotation else part / length**0.5
            width = min(length, rest.shape[-1])
            rest[of, :, :width] = back[..., :width]
        kept = torch.arange(rest.shape[-1], device=z.device) < basis.rank[:, None, None]
        rest = rest * kept
        if r.norm_correction:
            rest = rest / rest.norm(dim=-1, keepdim=True).clamp_min(_EPSILON)
        # Bug B1 of the seed: under inner_product its decoder took the residual's length for 1.
        scale = torch.ones_like(encoded.norm) if self._unit() else encoded.norm
        c = rest * scale[..., None]
        for level in encoded.levels:
            c = c + level.value()
        return basis.unproject(c)

    def weighted_sums(self, encoded: Encoded, weights: torch.Tensor) -> torch.Tensor:
        """Float32 [q, d]: for each row of ``weights`` [q, n] the sum of the rows of a block (the
        only one of ``encoded``) times their weights.

        What :meth:`decode` does to every row is done to the sums: the weights go to the codes and,
        by centre, to the coefficients t; the transform, the centres and the basis then come once a
        row of weights. ValueError with norm_correction, which looks at every row by itself.
        """
        r, basis = self.recipe, encoded.basis
        if r.norm_correction:
            raise ValueError("norm_correction is of single rows; their sums cannot be folded")
        length, rank = int(encoded.length[0]), basis.rows.shape[1]
        scaled = weights if self._unit() else weights * encoded.norm
        z = scaled @ self._quantised(encoded)[0, :, :length]
        back = unrotate(z, r.seed) if r.rotation else z / length**0.5
        c = back[:, :rank]
        for level in encoded.levels:
            by_centre = weights.new_zeros(len(weights), level.centres.shape[1])
            by_centre.index_add_(1, level.chosen[0], weights * level.t)
            c = c + by_centre @ level.centres[0]
        return weights.sum(-1, keepdim=True) * basis.mean + c @ basis.rows[0]

    def _quantised(self, encoded: Encoded) -> torch.Tensor:
        """The values [B, n, L] that codes stand for, outliers at their own."""
        z = self.levels.to(encoded.norm.device)[encoded.indices.long()]
        return z if encoded.outlier is None else torch.where(encoded.outlier, encoded.exact, z)

    def stored_bytes(self, encoded: Encoded, d: int) -> int:
        """Bytes of all blocks' slots, shared bases counted once."""
        return int(sum(slots.sizes(self.recipe, encoded, d)))

    def _unit(self) -> bool:
        return self.metric == "inner_product" and self.recipe.residual_norm == "unit"

    def _levels(
        self, c: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[list[Level], torch.Tensor]:
        """K-means levels of coefficients [B, n, r] and what they leave, with t unrounded as the
        seed's encoder has it."""
        r, found, rest = self.recipe, [], c
        for k in (r.clusters, r.second_clusters):
            if not k:
                continue
            centres = kmeans.fit(
                rest,
                k,
                iterations=r.kmeans_iterations,
                weights=weights,
                seed=r.seed,
                dtype=self.dtype,
            )
            chosen, t = kmeans.assign(rest, centres)
            level = Level(centres, chosen, t)
            rest = rest - level.value()
            level.t = to_half(t, "coefficient t")
            found.append(level)
        return found, rest

    def scaled(self, rest: torch.Tensor, norm: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Residuals [B, n, r] padded, rotated, divided by their ``norm`` [B, n]: [B, n, L] of mean
        square 1 over a block's own ``length`` [B] coordinates, 0 beyond."""
        widest = int(length.max())
        rest = torch.nn.functional.pad(rest, (0, widest - rest.shape[-1]))
        out = torch.zeros_like(rest)
        inverse = torch.where(norm > _EPSILON, 1 / norm.clamp_min(_EPSILON), 1.0)[..., None]
        for size in length.unique().tolist():
            of = length == size
            part = rest[of][..., :size]
            part = rotate(part, self.recipe.seed) if self.recipe.rotation else part * size**0.5
            out[of, :, :size] = part * inverse[of]
        return out
