"""Principal components of blocks of rows: mean, orthonormal basis, rank.

Both methods work on the covariance, in float64. The randomised one is Halko, Martinsson and
Tropp's range finder (2011) on A^T, A = diag(sqrt w)(X - mean): its steps A^T Omega, then A^T A Z
with an orthonormalisation, then the eigenvectors of Q^T A^T A Q, span what the products with A
itself would, because orthonormalising changes no span.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

METHODS = ("exact", "randomized")
_EPSILON = 1e-12


@dataclass
class Basis:
    """Of B blocks. ``mean`` float32 [B, d]; ``rows`` float32 [B, r, d], orthonormal up to their
    storage type, rows from ``rank`` on are 0; ``rank`` int64 [B]."""

    mean: torch.Tensor
    rows: torch.Tensor
    rank: torch.Tensor

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients [B, n, r] of rows [B, n, d]."""
        return (x - self.mean[:, None]) @ self.rows.transpose(1, 2)

    def unproject(self, c: torch.Tensor) -> torch.Tensor:
        """Rows [B, n, d] of coefficients [B, n, r]."""
        return self.mean[:, None] + c @ self.rows

    def repeated(self, times: int) -> Basis:
        """Every block's, ``times`` times in a row."""
        return Basis(*(x.repeat_interleave(times, 0) for x in (self.mean, self.rows, self.rank)))


def moments(x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B, d] and covariance [B, d, d] of rows ``x`` [B, n, d] in float64.

    ``weights`` [B, n] >= 0, None: all 1. ValueError if a block's weights sum to 0.
    """
    x = x.double()
    if weights is None:
        weights = x.new_ones(x.shape[:2])
    weights = weights.double()
    total = weights.sum(1)
    if bool((weights < 0).any()) or bool((total <= _EPSILON).any()):
        raise ValueError("weights must be at least 0 and some row of each block above it")
    mean = torch.einsum("bn,bnd->bd", weights, x) / total[:, None]
    centred = (x - mean[:, None]) * weights.sqrt()[..., None]
    return mean, centred.transpose(1, 2) @ centred / total[:, None, None]


def rank_of(eigenvalues: torch.Tensor, variance_ratio: float, cap: int) -> torch.Tensor:
    """Int64 [B]: the fewest leading eigenvalues [B, m] whose sum reaches the share
    ``variance_ratio`` of them all, at least 1 and at most ``cap``; 1.0 gives the cap itself."""
    sums = eigenvalues.cumsum(-1)
    total = sums[:, -1:]
    if variance_ratio >= 1:
        rank = torch.full_like(total, cap, dtype=torch.int64)
    else:
        rank = (sums < variance_ratio * total).sum(-1, keepdim=True) + 1
    return torch.where(total > _EPSILON, rank, 1).squeeze(-1).clamp(1, cap)


def fit(
    x: torch.Tensor,
    *,
    method: str,
    variance_ratio: float = 1.0,
    target_rank: int | None = None,
    oversample: int = 8,
    power_iterations: int = 2,
    rank_cap: int | None = None,
    weights: torch.Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Basis:
    """The basis of every block of ``x`` [B, n, d], rounded to ``dtype`` as it would be stored.

    ``exact``: all d directions, cut by ``variance_ratio`` and ``rank_cap``. ``randomized``: at most
    ``target_rank`` (None: half of d, at least 8), cut by ``variance_ratio`` *of the sketched
    variance*, which is what the seed did.
    """
    mean, covariance = moments(x, weights)
    # Small factorisations, which a GPU does one after the other and slower than a CPU.
    covariance, width = covariance.cpu(), x.shape[-1]
    if method == "exact":
        values, vectors = _descending(covariance)
        cap = min(rank_cap or width, width)
    else:
        cap = min(target_rank or max(width // 2, 8), width)
        sketched = min(cap + oversample, width)
        span = _sketch(x, mean, weights, sketched, seed).cpu()
        for _ in range(power_iterations):
            span = covariance @ torch.linalg.qr(span).Q
        span = torch.linalg.qr(span).Q
        values, inner = _descending(span.transpose(1, 2) @ covariance @ span)
        vectors = span @ inner
    rank = rank_of(values, variance_ratio, cap)
    width = int(rank.max())
    kept = torch.arange(width) < rank[:, None]
    rows = (vectors[..., :width].transpose(1, 2) * kept[..., None]).to(x.device)
    return Basis(mean.to(dtype).float(), rows.to(dtype).float(), rank.to(x.device))


def _descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [B, m], largest first and none below 0, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def _sketch(
    x: torch.Tensor, mean: torch.Tensor, weights: torch.Tensor | None, width: int, seed: int
) -> torch.Tensor:
    """A^T Omega [B, d, width], Omega Gaussian and the same for every block."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(x.shape[1], width, dtype=torch.float64, generator=generator).to(x.device)
    centred = x.double() - mean[:, None]
    if weights is not None:
        centred = centred * weights.double().sqrt()[..., None]
    return centred.transpose(1, 2) @ omega
