"""Sigma_q: its moments, its factor, what it is good for; rows are those of docs/seed.md."""

from __future__ import annotations

import pytest
import torch
from kakeya_vllm.rope import Rope
from kakeya_vllm.seed import whitening
from kakeya_vllm.seed.codec import BlockCodec
from kakeya_vllm.seed.recipe import StreamRecipe
from test_seed_codec import draw

D = 32


def queries(tokens: int = 2000, heads: int = 2, group: int = 3) -> torch.Tensor:
    """[tokens, heads * group, D], of a strongly uneven second moment with correlations."""
    turn = torch.linalg.qr(draw(D, D, seed=5)).Q
    return (draw(tokens, heads * group, D) * torch.logspace(1, -1, D)) @ turn


def sigma() -> torch.Tensor:
    q = queries()
    return whitening.second_moment(q, 2) / (q.shape[0] * 3)


def test_row_28_whitening_is_undone_and_lowers_the_error_of_scores():
    lower, inverse = whitening.factors(sigma(), 1e-3, None, "raw")
    k = draw(1024, 2, D, seed=1)
    there = whitening.whiten(k, lower)
    assert float((whitening.whiten(there, inverse) - k).abs().max()) < 2e-5 * float(k.abs().max())
    torch.testing.assert_close(
        lower @ lower.transpose(1, 2),
        whitening.regularised(sigma(), 1e-3).float(),
        rtol=1e-4,
        atol=1e-3,
    )
    codec = BlockCodec(StreamRecipe(grouping="per-head"))

    def coded(rows):
        blocks = rows.transpose(0, 1).reshape(2, 2, 512, D)
        return codec.decode(codec.encode(blocks)).reshape(2, 1024, D).transpose(0, 1)

    plain = coded(k) - k
    whitened = whitening.whiten(coded(there), inverse) - k

    def score_error(e):
        scores = torch.einsum("qhgd,thd->hgqt", queries(200).unflatten(1, (2, 3)), e)
        return float(scores.square().mean())

    assert score_error(whitened) < 0.5 * score_error(plain)


def test_row_28_a_unit_scale_changes_nothing_but_the_scale():
    raw, unit = (whitening.factors(sigma(), 1e-3, 50.0, s) for s in ("raw", "unit"))
    ratio = raw[0].diagonal(dim1=1, dim2=2) / unit[0].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)
    product = unit[0] @ unit[0].transpose(1, 2)
    mean = product.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(mean, torch.ones(2), rtol=1e-4, atol=0)


def test_row_29_query_heads_of_a_group_are_summed():
    q = queries(50)
    got = whitening.second_moment(q, 2)
    for head in range(2):
        brute = sum(
            torch.outer(q[t, h].double(), q[t, h].double())
            for t in range(50)
            for h in range(3 * head, 3 * head + 3)
        )
        torch.testing.assert_close(got[head], brute)


@pytest.mark.parametrize("cap", [2.0, 10.0, 1e6])
def test_row_30_the_condition_of_the_factor_is_held(cap):
    singular = torch.zeros(1, D, D, dtype=torch.float64)
    singular[0, 0, 0] = 1
    for given in (sigma(), singular):
        lower, _ = whitening.factors(given, 1e-3, cap, "unit")
        assert float(torch.linalg.cond(lower).max()) <= 1.01 * cap
    free = torch.linalg.cond(whitening.factors(sigma(), 1e-3, None, "unit")[0])
    held = torch.linalg.cond(whitening.factors(sigma(), 1e-3, 1e6, "unit")[0])
    torch.testing.assert_close(free, held)


def test_lags_are_averaged_as_scores_see_them():
    """E over lags of (q . R_-s e)^2 is e Sigma' e."""
    rope = Rope(D, False, tuple(10000.0 ** (-2 * i / D) for i in range(D // 2)))
    s = sigma()
    got = whitening.lag_averaged(s, rope)
    e = draw(2, D, seed=8).double()
    total = torch.zeros(2, dtype=torch.float64)
    half = D // 2
    for lag in whitening.LAGS:
        angle = torch.tensor(rope.inv_freq, dtype=torch.float64) * -lag
        a, b = e[:, :half], e[:, half:]
        turned = torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1
        )
        total += torch.einsum("hd,hde,he->h", turned, s, turned)
    torch.testing.assert_close(torch.einsum("hd,hde,he->h", e, got, e), total / len(whitening.LAGS))
    assert torch.equal(whitening.lag_averaged(s, None), s)
    # Fast pairs lose their direction: averaging can only better the condition.
    assert (torch.linalg.cond(got) < torch.linalg.cond(s)).all()


def test_whitening_for_zero_lag_is_not_for_other_lags():
    """Keys err along what queries at the same position do not see; RoPE turns it into their view.
    A metric averaged over lags does not let them."""
    rope = Rope(D, False, tuple(10000.0 ** (-2 * i / D) for i in range(D // 2)))
    half = D // 2
    # Queries see one coordinate of every pair only.
    weight = torch.cat([torch.ones(half), torch.full((half,), 1e-3)]).double()
    seen = torch.diag(weight)[None]
    averaged = whitening.lag_averaged(seen, rope)
    k = draw(2, 512, 1, D, seed=6).flatten(0, 1)
    codec = BlockCodec(StreamRecipe(grouping="per-head"))

    def coded(sigma):
        lower, inverse = whitening.factors(sigma, 1e-3, None, "unit")
        rows = whitening.whiten(k, lower).transpose(0, 1).reshape(1, 2, 512, D)
        back = codec.decode(codec.encode(rows)).reshape(1, 1024, D).transpose(0, 1)
        return (whitening.whiten(back, inverse) - k)[:, 0].double()

    zero, mean = coded(seen), coded(averaged)
    at_once, later = (
        (lambda e, s=s: float(((e @ s[0]) * e).sum(1).mean())) for s in (seen, averaged)
    )
    assert at_once(zero) < at_once(mean)
    assert later(mean) < later(zero)
