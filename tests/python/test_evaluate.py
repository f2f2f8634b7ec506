"""The figures of an evaluation, on distributions whose figures are known, and its planning."""

import numpy as np
import pytest
from kakeya_vllm.evaluation import command, generation, metrics, protocol
from kakeya_vllm.evaluation.metrics import TokenFigures


def log_probabilities(seed, shape=(4, 8, 32)):
    logits = np.random.default_rng(seed).normal(size=shape) * 2
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


TARGETS = np.random.default_rng(7).integers(0, 32, (4, 8))


def compare(reference, rows, targets=TARGETS):
    return TokenFigures.of(reference, rows, targets).quality()


def test_equal_runs_differ_by_nothing():
    rows = log_probabilities(0)
    figures = compare(rows, rows, TARGETS)
    assert figures["delta_ppl"] == 0
    assert figures["delta_ppl_95"] == [0, 0]
    assert figures["top1"] == 1
    assert figures["top1_95"] == [1, 1]
    assert figures["kl_mean"] == figures["kl_99.9"] == 0
    assert figures["passages"] == 4
    assert figures["predictions"] == 32


def test_figures_equal_their_definitions():
    ref, alt = log_probabilities(1), log_probabilities(2)
    figures = compare(ref, alt, TARGETS)
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
    a, b = (compare(ref, alt, TARGETS) for _ in range(2))
    assert a == b
    for name in ("delta_ppl", "top1", "kl_mean"):
        low, high = a[f"{name}_95"]
        assert low < a[name] < high


def test_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = metrics.interval(values, np.mean)
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_mismatched_runs_are_refused():
    rows = log_probabilities(0)
    with pytest.raises(ValueError, match="shapes differ"):
        compare(rows, rows[:3], TARGETS)
    with pytest.raises(ValueError, match="shapes differ"):
        compare(rows, rows, TARGETS[:, :5])


def quality(delta, half, top1=0.97, passages=24):
    return {
        "passages": passages,
        "delta_ppl": delta,
        "delta_ppl_95": [delta - half, delta + half],
        "top1": top1,
    }


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        (quality(0.004, 0.004), "ACCEPT"),
        (quality(-0.009, 0.005), "ACCEPT"),
        (quality(0.011, 0.0049), "MARGINAL"),
        (quality(0.004, 0.004, top1=0.949), "MARGINAL"),
        (quality(0.004, 0.005, top1=0.73), "REJECT"),
        (quality(0.0, 0.006), "ACCEPT"),  # wherever in it the truth lies
        (quality(0.005, 0.008), "UNDECIDED"),
        (quality(0.1, 0.05), "MARGINAL"),
        (quality(-0.15, 0.1), "UNDECIDED"),
        (quality(1.0, 0.11), "REJECT"),
        (quality(0.0, 0.5, top1=0.5), "REJECT"),
    ],
)
def test_verdict(figures, verdict):
    assert metrics.verdict(figures) == verdict


def test_more_passages_are_asked_for_by_the_width_of_the_interval():
    assert metrics.passages_needed(quality(0, 0.01, passages=24)) == 119
    assert metrics.passages_needed(quality(0, 0.0045, passages=24)) == 24


def test_passages_of_several_runs_are_one_evaluation():
    ref, alt = log_probabilities(1), log_probabilities(2)
    parts = [TokenFigures.of(ref[p], alt[p], TARGETS[p]) for p in (slice(1), slice(1, 4))]
    assert TokenFigures.joined(parts).quality() == compare(ref, alt)


def test_figures_by_passage_and_by_position_average_to_the_whole():
    figures = TokenFigures.of(log_probabilities(1), log_probabilities(2), TARGETS)
    whole, passages = figures.quality(), figures.per_passage()
    assert np.mean(passages["top1"]) == pytest.approx(whole["top1"])
    assert np.mean(passages["kl"]) == pytest.approx(whole["kl_mean"])
    assert np.mean(figures.kl_by_position()) == pytest.approx(whole["kl_mean"])
    assert len(figures.kl_by_position()) == 8


def plan(names, **changes):
    wishes = {
        "mode": "snapshot",
        "streams": "kv",
        "layers": None,
        "boundaries": [0],
        "coded_tokens": 2048,
        "num_layers": 6,
    }
    return command.plan_caches(names, **wishes | changes)


def test_a_snapshot_of_all_streams_runs_the_backend_and_the_rest_is_simulated():
    assert [c.kind for c in plan([None, "kakeya-5.3x", "fp8"])] == ["kakeya", "kakeya", "stock"]
    assert [c.kind for c in plan(["a"], mode="in-forward")] == ["simulated"]
    assert [c.kind for c in plan(["a"], streams="k")] == ["simulated"]


def test_boundaries_make_one_run_each():
    caches = plan(["a"], boundaries=[0, 1, 2])
    assert [c.layers for c in caches] == [None, (1, 2, 3, 4), (2, 3)]
    assert len({c.label for c in caches}) == 3
    kept = command.environment_of(caches[1], 6)
    assert kept == {"KAKEYA_RECIPE": "a", "KAKEYA_BOUNDARY_SKIP_LAYERS": "0,5"}


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (["fp8"], {"mode": "in-forward"}, "fp8 is vLLM's own cache"),
        (["turboquant_3bit_nc"], {"boundaries": [1]}, "turboquant_3bit_nc is vLLM's own"),
        ([None], {"mode": "generate", "streams": "v"}, "both streams"),
        ([None], {"layers": (6,)}, "layers 0 to 5"),
        ([None], {"boundaries": [3]}, "no layers are left"),
    ],
)
def test_plans_that_cannot_be_are_refused(names, changes, words):
    with pytest.raises(SystemExit, match=words):
        plan(names, **changes)


def test_a_recipe_that_the_plugin_chose_is_called_by_its_name():
    (cache,) = plan([None], boundaries=[1])
    ran = {"codec": {"name": "kakeya-free-4.6x"}}
    assert command._label(cache, ran) == "kakeya-free-4.6x, boundary 1"
    assert command._label(plan(["fp8"])[0], {"codec": None}) == "fp8"


def test_report_names_every_figure():
    cache = {"kv_cache_bytes": 2**30, "bytes_per_token": 23040.0, "capacity_tokens": 46592}
    small = {**cache, "bytes_per_token": 5000.0, "capacity_tokens": 214784}
    text = command.report(
        {
            "settings": {
                "model": "m",
                "text": "t.txt",
                "passages": 4,
                "prefix_tokens": 2048,
                "scored_tokens": 64,
                "mode": "snapshot",
                "streams": "kv",
            },
            "reference": {"label": "bf16", "cache": cache, "ppl": 15.25},
            "runs": [
                {
                    "label": "kakeya-4.6x",
                    "ratio": 4.608,
                    "cache": small,
                    "open_blocks_bytes": 2**21,
                    "quality": compare(log_probabilities(1), log_probabilities(2)),
                    "verdict": "REJECT",
                }
            ],
        }
    )
    for part in (
        "23,040",
        "5,000",
        "214,784 in 1.00 GiB",
        "4.61x",
        "delta ppl",
        "top-1",
        "KL",
        "REJECT",
        "2.0 MiB",
        "15.25",
    ):
        assert part in text


def test_ratio_and_bytes_of_a_simulated_cache_are_starred():
    stored = {"bytes_per_token": 3791.25, "ratio": 6.077}
    assert command._ratio({}, {"stored": stored, "cache": None}) == 6.077
    assert command._ratio({}, {"stored": None, "cache": None}) is None
    assert command._allocated({"stored": stored, "cache": None}) == ("3,791*", "")


def fake_engines(monkeypatch, broken):
    """`evaluate` without engines: every cache answers with noise of its own, but those that are
    broken, from their `broken[name]`-th run on."""
    ran = []

    def in_child(spec, _environment):
        for cache, out in zip(spec["caches"], spec["figures"], strict=True):
            ran.append(cache.name)
            if ran.count(cache.name) > broken.get(cache.name, 9):
                raise SystemExit(f"kakeya: the engine for {cache.label} failed (exit 1)")
            if cache.name != protocol.REFERENCE:
                passages = len(spec["passages"])
                ref, alt = (log_probabilities(i, (passages, 8, 32)) for i in (1, len(ran)))
                found = TokenFigures.of(ref, alt, np.zeros((passages, 8), int))
                np.savez(out, **vars(found))
        size = {"kv_cache_bytes": 1, "bytes_per_token": 8.0, "capacity_tokens": 1}
        about = {"cache": size, "stored": None, "codec": None, "open_blocks_bytes": None}
        return [about for _ in spec["caches"]]

    monkeypatch.setattr(protocol, "in_child", in_child)
    monkeypatch.setattr(command, "layers_of", lambda _: 4)
    monkeypatch.setattr(command, "refuse_mixed", lambda _: None)
    monkeypatch.setattr(command, "read_text", str)
    monkeypatch.setattr(command, "tokenise", lambda *_: list(range(60 * protocol.PASSAGE)))
    monkeypatch.setattr(command, "settings_of", lambda *_: {})


def test_a_cache_that_fails_does_not_take_the_others_figures(monkeypatch, capsys):
    fake_engines(monkeypatch, {"fp8": 0})
    result = command.evaluate("m", "t", 4, ["fp8", "kakeya-4.6x"])
    assert [run["label"] for run in result["runs"]] == ["kakeya-4.6x"]
    assert result["failed"] == ["fp8"]
    assert "engine for fp8 failed (exit 1); it is left out" in capsys.readouterr().err


def test_a_cache_that_fails_later_is_left_out_altogether(monkeypatch):
    fake_engines(monkeypatch, {"fp8": 1})
    enough = command.FIRST_PASSAGES + 1
    monkeypatch.setattr(metrics, "is_resolved", lambda quality: quality["passages"] >= enough)
    result = command.evaluate("m", "t", None, ["kakeya-4.6x", "fp8"])
    assert result["settings"]["passages"] > command.FIRST_PASSAGES
    assert [run["label"] for run in result["runs"]] == ["kakeya-4.6x"]
    assert result["runs"][0]["quality"]["passages"] == result["settings"]["passages"]
    assert result["failed"] == ["fp8"]


@pytest.mark.parametrize(("broken", "message"), [("bf16", "for bf16"), ("fp8", "every engine")])
def test_nothing_is_said_where_no_cache_is_left(monkeypatch, broken, message):
    fake_engines(monkeypatch, {broken: 0})
    with pytest.raises(SystemExit, match=message):
        command.evaluate("m", "t", 4, ["fp8"])


def test_answers_are_compared_from_their_first_difference():
    found = generation.compare([[1, 2, 3, 4], [5, 6], [7, 8]], [[1, 2, 9, 4], [5, 6], [0, 8]])
    assert found["first_difference"] == [2, 2, 0]
    assert found["first_difference_median"] == 2
    assert found["never_different"] == pytest.approx(1 / 3)
    assert found["agreement"] == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert "33%" in generation.report([{"label": "a", "seconds": 1.0, **found}], 4)
    with pytest.raises(ValueError, match="1 answers for 2"):
        generation.compare([[1], [2]], [[1]])


class FakeSteps(protocol.Steps):
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
    monkeypatch.setattr(protocol.engine, "run_prompt", lambda *_: steps.spans.extend(spans))
    with pytest.raises(RuntimeError, match="the protocol needs"):
        steps.log_probabilities(None, [])
