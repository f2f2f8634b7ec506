"""Spherical K-means: which of a few directions, or their opposites, each row goes along."""

from __future__ import annotations

import torch

_EPSILON = 1e-8


def assign(c: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows ``c`` [B, n, r]: the centre (of ``centres`` [B, k, r]) of the largest absolute
    product, int64 [B, n], and that product with its sign, [B, n]."""
    products = c @ centres.transpose(1, 2)
    chosen = products.abs().argmax(-1)
    return chosen, products.gather(-1, chosen[..., None]).squeeze(-1)


def fit(
    c: torch.Tensor,
    k: int,
    *,
    iterations: int = 32,
    weights: torch.Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Unit centres [B, k, r] of rows ``c`` [B, n, r], rounded to ``dtype`` as they would be stored.

    Rows of weight 0 or length 0 take no part. Farthest-first start: row ``seed`` mod their number,
    then again and again the row whose largest *signed* cosine with the centres is smallest, as in
    the seed, although assignment ignores signs. At most ``iterations`` rounds, fewer where nothing
    changes; a centre without rows stays. Blocks with fewer than k such rows repeat centres; one
    with none has zeros.
    """
    lengths = c.norm(dim=-1, keepdim=True)
    valid = lengths.squeeze(-1) > _EPSILON
    if weights is not None:
        valid &= weights > 0
    unit = torch.where(valid[..., None], c / lengths.clamp_min(_EPSILON), 0)
    centres = _farthest_first(unit, valid, k, seed)
    weight = valid.float() if weights is None else valid * weights.float()
    before = None
    for _ in range(iterations):
        chosen, product = assign(unit, centres)
        if before is not None and torch.equal(chosen, before):
            break
        before = chosen
        signed = unit * (torch.where(product < 0, -1.0, 1.0) * weight)[..., None]
        member = torch.nn.functional.one_hot(chosen, k).to(unit.dtype)
        # A product instead of scattered additions: the same sums in every run on a GPU.
        sums = member.transpose(1, 2) @ signed
        size = sums.norm(dim=-1, keepdim=True)
        centres = torch.where(size > _EPSILON, sums / size.clamp_min(_EPSILON), centres)
    return centres.to(dtype).float()


def _farthest_first(unit: torch.Tensor, valid: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    places = valid.long().cumsum(1)
    first = seed % places[:, -1].clamp_min(1) + 1
    index = (places >= first[:, None]).long().argmax(1)
    cosine = torch.full(valid.shape, -2.0, device=unit.device)
    found = []
    for _ in range(k):
        centre = unit.gather(1, index[:, None, None].expand(-1, 1, unit.shape[-1]))
        found.append(centre)
        cosine = torch.maximum(cosine, (unit @ centre.transpose(1, 2)).squeeze(-1))
        index = torch.where(valid, cosine, torch.inf).argmin(1)
    return torch.cat(found, 1)
