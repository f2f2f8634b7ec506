"""Sigma_q: the metric in which a key's error matters, and the factor that whitens keys with it.

Sigma_q is the mean of q q^T over tokens and over the query heads that share a KV head, queries
before RoPE. With L L^T = Sigma_q, the squared error of k L is the mean squared error of the scores
q . k, exactly where query and key stand at one position. For a key s tokens earlier the score is
q . R_-s k: averaged over lags, Sigma_q becomes the mean of R_s Sigma_q R_-s.
"""

from __future__ import annotations

import dataclasses

import torch

from kakeya_vllm.rope import Rope

# Lags that "averaged" looks at: every 16th up to a prefix of 2,048 tokens.
LAGS = range(0, 2048, 16)


def second_moment(q: torch.Tensor, heads: int) -> torch.Tensor:
    """Float64 [heads, D, D]: sum over tokens and group of q q^T, of queries [tokens, query heads,
    D]; query head i belongs to KV head i // group."""
    rows = q.double().unflatten(1, (heads, -1))
    return torch.einsum("thgd,thge->hde", rows, rows)


def lag_averaged(sigma: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Mean over LAGS of R_s Sigma R_-s, for Sigma [.., D, D], in float64."""
    from kakeya_vllm.calibrate import Unrotation

    sigma = sigma.double()
    if rope is None:
        return sigma
    unit = torch.eye(sigma.shape[-1], dtype=torch.float64, device=sigma.device)
    total = torch.zeros_like(sigma)
    for lag in LAGS:
        # At position 1 of frequencies times the lag, row i is unit vector i turned back by it.
        scaled = dataclasses.replace(rope, inv_freq=tuple(f * lag for f in rope.inv_freq))
        rows = unit.expand(2, *unit.shape).clone()
        turn = Unrotation(scaled, unit.shape[0], sigma.device)(rows)[1]
        total += turn @ sigma @ turn.T
    return total / len(LAGS)


def regularised(
    sigma: torch.Tensor, ridge: float, condition_cap: float | None = None
) -> torch.Tensor:
    """Sigma [H, D, D] made symmetric, with ``ridge`` of its mean diagonal added and as much more
    as holds the condition number of its Cholesky factor to ``condition_cap`` (of Sigma itself: its
    square)."""
    sigma = (sigma + sigma.transpose(-1, -2)).double() / 2
    unit = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    mean = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)
    sigma = sigma + (ridge * mean)[:, None, None] * unit
    if condition_cap is not None:
        values = torch.linalg.eigvalsh(sigma)
        square = condition_cap**2
        more = (values[:, -1] - square * values[:, 0]) / max(square - 1, 1e-9)
        sigma = sigma + more.clamp_min(0)[:, None, None] * unit
    return sigma


def factors(
    sigma: torch.Tensor, ridge: float, condition_cap: float | None, scale: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 L and its inverse [H, D, D] of Sigma, float64 or float32 [H, D, D]: rows times L are
    whitened. ``scale`` "unit" first divides each Sigma by its mean diagonal."""
    sigma = regularised(sigma, ridge, condition_cap)
    if scale == "unit":
        sigma = sigma / sigma.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    lower = torch.linalg.cholesky(sigma)
    unit = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    inverse = torch.linalg.solve_triangular(lower, unit.expand_as(lower), upper=False)
    return lower.float(), inverse.float()


def whiten(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Rows [tokens, H, D] times the factor [H, D, D] of their head; the inverse undoes it."""
    return torch.einsum("thd,hde->the", x, factor)
