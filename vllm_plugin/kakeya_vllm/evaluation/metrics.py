"""Figures of an evaluation: from log-probabilities to a verdict.

Everything is paired: both caches predict the same tokens from the same passages. Intervals are 95 %
bootstrap intervals over passages, because tokens of a passage are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BOOTSTRAP_SAMPLES = 10_000
# Half-width of the interval of delta ppl at which a verdict is one.
RESOLUTION = 0.005
ACCEPT, MARGINAL, REJECT, UNDECIDED = "ACCEPT", "MARGINAL", "REJECT", "UNDECIDED"


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> list[float]:
    """[low, high]: 95 % bootstrap interval of ``statistic`` over the rows of ``values``."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))
    samples = np.sort([statistic(values[p]) for p in picks])
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


@dataclass
class TokenFigures:
    """What is kept of every prediction: float64 [passages, predictions a passage] each."""

    nll_reference: np.ndarray  # nats
    nll: np.ndarray
    agree: np.ndarray  # whether the most likely token is the reference's
    kl: np.ndarray  # KL(reference || this) over the whole vocabulary, nats

    @classmethod
    def of(cls, reference: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> TokenFigures:
        """``reference``, ``rows``: log-probabilities [passages, n, vocabulary]; ``targets``: int
        [passages, n]. Passages are read one at a time, so both may be memory maps."""
        if reference.shape != rows.shape or reference.shape[:2] != targets.shape:
            raise ValueError(
                f"shapes differ: {reference.shape}, {rows.shape}, targets {targets.shape}"
            )
        made = cls(*(np.empty(targets.shape) for _ in range(4)))
        for p in range(len(targets)):
            made.set(p, reference[p], rows[p], targets[p])
        return made

    def set(self, p: int, reference: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> None:
        """Passage ``p`` from its log-probabilities [n, vocabulary] and targets [n]."""
        ref, alt = (np.asarray(x, dtype=np.float64) for x in (reference, rows))
        at = np.arange(len(targets))
        self.nll_reference[p], self.nll[p] = -ref[at, targets], -alt[at, targets]
        self.agree[p] = ref.argmax(-1) == alt.argmax(-1)
        self.kl[p] = (np.exp(ref) * (ref - alt)).sum(-1)

    @classmethod
    def empty(cls, passages: int, predictions: int) -> TokenFigures:
        return cls(*(np.empty((passages, predictions)) for _ in range(4)))

    @classmethod
    def joined(cls, parts: list[TokenFigures]) -> TokenFigures:
        """Passages of several runs, one after the other."""
        names = ("nll_reference", "nll", "agree", "kl")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def quality(self) -> dict[str, Any]:
        """delta_ppl = exp(mean nll - mean nll of the reference) - 1; shares and nats otherwise."""
        difference = self.nll - self.nll_reference

        def delta(x: np.ndarray) -> float:
            return float(np.expm1(x.mean()))

        return {
            "passages": int(self.nll.shape[0]),
            "predictions": int(self.nll.size),
            "ppl_reference": float(np.exp(self.nll_reference.mean())),
            "ppl": float(np.exp(self.nll.mean())),
            "delta_ppl": delta(difference),
            "delta_ppl_95": interval(difference.mean(1), delta),
            "top1": float(self.agree.mean()),
            "top1_95": interval(self.agree.mean(1), np.mean),
            "kl_mean": float(self.kl.mean()),
            "kl_mean_95": interval(self.kl.mean(1), np.mean),
            "kl_median": float(np.median(self.kl)),
            "kl_99.9": float(np.quantile(self.kl, 0.999)),
        }

    def per_passage(self) -> dict[str, list[float]]:
        return {
            "delta_ppl": np.expm1((self.nll - self.nll_reference).mean(1)).tolist(),
            "top1": self.agree.mean(1).tolist(),
            "kl": self.kl.mean(1).tolist(),
        }

    def kl_by_position(self) -> list[float]:
        """Mean over passages, by place among the scored tokens."""
        return self.kl.mean(0).tolist()


def half_width(quality: dict[str, Any]) -> float:
    """Of the interval of delta ppl."""
    low, high = quality["delta_ppl_95"]
    return (high - low) / 2


def judge(delta_ppl: float, top1: float) -> str:
    """The gate, on means."""
    if abs(delta_ppl) <= 0.01 and top1 >= 0.95:
        return ACCEPT
    if abs(delta_ppl) <= 0.20 and top1 >= 0.74:
        return MARGINAL
    return REJECT


def is_resolved(quality: dict[str, Any]) -> bool:
    """Whether passages suffice: the interval of delta ppl is narrow, or wherever in it the truth
    lies the verdict is the same."""
    low, high = quality["delta_ppl_95"]
    # judge() looks at |delta ppl|: its extremes over the interval are at the ends, and at 0.
    places = [low, high] + [0.0] * (low <= 0 <= high)
    same = len({judge(delta, quality["top1"]) for delta in places}) == 1
    return half_width(quality) <= RESOLUTION or same


def verdict(quality: dict[str, Any]) -> str:
    """ACCEPT, MARGINAL or REJECT on the means; UNDECIDED with too few passages."""
    if not is_resolved(quality):
        return UNDECIDED
    return judge(quality["delta_ppl"], quality["top1"])


def passages_needed(quality: dict[str, Any]) -> int:
    """How many passages should bring the half-width to RESOLUTION, with a tenth to spare."""
    ratio = half_width(quality) / (0.9 * RESOLUTION)
    return int(np.ceil(quality["passages"] * ratio**2))


@dataclass
class LayerErrors:
    """Sums of squares by layer, of K and of V: errors and values."""

    error: dict[str, dict[int, float]] = field(default_factory=lambda: {"k": {}, "v": {}})
    value: dict[str, dict[int, float]] = field(default_factory=lambda: {"k": {}, "v": {}})

    def add(self, stream: str, layer: int, error: float, value: float) -> None:
        for sums, x in ((self.error, error), (self.value, value)):
            sums[stream][layer] = sums[stream].get(layer, 0.0) + x

    def relative(self) -> dict[str, list[float]] | None:
        """Root of error over value by layer, in the order of the layers; None without any."""
        if not any(self.value.values()):
            return None
        return {
            stream: [
                float(np.sqrt(self.error[stream][i] / max(self.value[stream][i], 1e-30)))
                for i in sorted(self.value[stream])
            ]
            for stream in ("k", "v")
        }
