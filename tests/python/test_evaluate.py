"""The figures of an evaluation, on distributions whose figures are known."""

import numpy as np
import pytest
from kakeya_vllm import evaluate


def log_probabilities(seed, shape=(4, 8, 32)):
    logits = np.random.default_rng(seed).normal(size=shape) * 2
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


TARGETS = np.random.default_rng(7).integers(0, 32, (4, 8))


def test_equal_runs_differ_by_nothing():
    rows = log_probabilities(0)
    figures = evaluate.compare(rows, rows, TARGETS)
    assert figures["delta_ppl"] == 0
    assert figures["delta_ppl_95"] == [0, 0]
    assert figures["top1"] == 1
    assert figures["top1_95"] == [1, 1]
    assert figures["kl_mean"] == figures["kl_99.9"] == 0
    assert figures["passages"] == 4
    assert figures["predictions"] == 32


def test_figures_equal_their_definitions():
    ref, alt = log_probabilities(1), log_probabilities(2)
    figures = evaluate.compare(ref, alt, TARGETS)
    nll = [-np.take_along_axis(x.astype(float), TARGETS[..., None], 2).mean() for x in (ref, alt)]
    assert figures["ppl_reference"] == pytest.approx(np.exp(nll[0]))
    assert figures["ppl"] == pytest.approx(np.exp(nll[1]))
    assert figures["delta_ppl"] == pytest.approx(figures["ppl"] / figures["ppl_reference"] - 1)
    assert figures["top1"] == pytest.approx((ref.argmax(-1) == alt.argmax(-1)).mean())
    kl = (np.exp(ref.astype(float)) * (ref - alt)).sum(-1)
    assert figures["kl_mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert figures["kl_median"] == pytest.approx(np.median(kl), rel=1e-5)
    assert (kl > 0).all()


def test_intervals_hold_the_figure_and_are_reproducible():
    ref, alt = log_probabilities(1), log_probabilities(2)
    a, b = (evaluate.compare(ref, alt, TARGETS) for _ in range(2))
    assert a == b
    for name in ("delta_ppl", "top1", "kl_mean"):
        low, high = a[f"{name}_95"]
        assert low < a[name] < high


def test_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = evaluate.interval(values, np.mean)
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_mismatched_runs_are_refused():
    rows = log_probabilities(0)
    with pytest.raises(ValueError, match="shapes differ"):
        evaluate.compare(rows, rows[:3], TARGETS)
    with pytest.raises(ValueError, match="shapes differ"):
        evaluate.compare(rows, rows, TARGETS[:, :5])


def test_report_names_every_figure():
    cache = {"kv_cache_bytes": 2**30, "bytes_per_token": 23040.0, "capacity_tokens": 46592}
    small = {**cache, "bytes_per_token": 5000.0, "capacity_tokens": 214784}
    quality = evaluate.compare(log_probabilities(1), log_probabilities(2), TARGETS)
    text = evaluate.report(
        {
            "quality": quality,
            "reference": {"cache": cache, "dtype": "bfloat16"},
            "kakeya": {"cache": small, "codec": {"name": "kakeya-4.6x", "calibrated": True}},
            "capacity_ratio": 214784 / 46592,
        }
    )
    for part in (
        "recipe kakeya-4.6x (calibrated) against bf16",
        "23,040.0",
        "4.61x",
        "214,784",
        "delta ppl",
        "top-1",
        "mean KL",
    ):
        assert part in text


class FakeSteps(evaluate.Steps):
    """Steps without a model."""

    def __init__(self, spans):
        self.spans, self.recorded, self.hidden = [], spans, None


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 2047, 2048), (2048, 2111, 64), (2112, 2112, 1)],
        [(0, 2112, 2113)],
        [(0, 1023, 1024), (1024, 2112, 1089)],
        [],
    ],
)
def test_other_steps_than_the_protocol_are_refused(spans, monkeypatch):
    steps = FakeSteps(spans)
    monkeypatch.setattr(evaluate.engine, "run_prompt", lambda *_: steps.spans.extend(spans))
    with pytest.raises(RuntimeError, match="the protocol needs"):
        steps.log_probabilities(None, [])
