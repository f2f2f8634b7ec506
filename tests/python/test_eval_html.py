"""The HTML report: a well-formed, self-contained page, whatever the result holds."""

import copy
import json
import math
from html.parser import HTMLParser

import pytest
from kakeya_vllm.evaluation.html import render

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "<script>alert('x')</script>\"&\ud800\x00"
NAN, INF = math.nan, math.inf


class Page(HTMLParser):
    """Checks that tags are balanced; keeps elements, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)


def make_run(label="kakeya-4.6x", kl=0.0123, **changes):
    run = {
        "label": label,
        "kind": "kakeya",
        "ratio": 4.61,
        "cache": {"bytes_per_token": 6220.2, "capacity_tokens": 604241, "kv_cache_bytes": 2**32},
        "open_blocks_bytes": 2**23,
        "codec": {"name": "e8", "quantizer": "lattice", "calibrated": True},
        "verdict": "ACCEPT",
        "quality": {
            "passages": 4,
            "predictions": 256,
            "ppl": 8.165,
            "delta_ppl": 0.0052,
            "delta_ppl_95": [-0.0011, 0.0115],
            "top1": 0.9633,
            "top1_95": [0.9593, 0.9673],
            "kl_mean": kl,
            "kl_mean_95": [kl * 0.9, kl * 1.1],
            "kl_median": kl / 3,
            "kl_99.9": kl * 20,
        },
        "per_passage": {"delta_ppl": [0.01, -0.02, 0.03, 0.0], "top1": [0.96] * 4, "kl": [kl] * 4},
        "kl_by_position": [kl * (1 + i / 64) for i in range(64)],
        "layer_error": {"k": [0.1, 0.05, 0.04], "v": [0.09, 0.08, 0.07]},
    }
    return run | changes


def make_result(*runs):
    return {
        "settings": {
            "model": "tiny",
            "text": "text.txt",
            "text_sha256": "ab" * 32,
            "mode": "snapshot",
            "streams": "kv",
            "dtype": "bfloat16",
            "prefix_tokens": 2048,
            "scored_tokens": 64,
            "command": "kakeya eval --model tiny --html out.html",
        },
        "versions": {"vllm": "1.2.3"},
        "reference": {"label": "bf16", "ppl": 8.123, "cache": {"bytes_per_token": 28672.0}},
        "runs": list(runs),
    }


def numbers_of(page):
    """Every coordinate of the page's drawings, with the attribute it stands in."""
    for _, attributes in page.elements:
        for name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "points"):
            for number in attributes.get(name, "").replace(",", " ").split():
                yield name, float(number)


def check(result):
    text = render(result)
    assert "nan" not in text.split("<main>")[0]
    page = Page(text)
    for name, number in numbers_of(page):
        assert 0 <= number <= 760, name
    return page


def test_page_shows_the_figures():
    page = check(make_result(make_run()))
    for expected in (
        "tiny",
        "ab" * 32,
        "28,672",
        "6,220",
        "4.61×",
        "8.165",
        "+0.52 % [−0.11 %, +1.15 %]",
        "96.33 % [95.93 %, 96.73 %]",
        "0.0123 [0.0111, 0.0135]",
        "ACCEPT",
        "passages: 4, predictions: 256, capacity tokens: 604,241, open blocks bytes: 8,388,608",
        "codec calibrated: yes",
        "half-width",
        "Mean +0.52 %, least −2.00 %, most +3.00 %; passages: 4.",
        "vllm 1.2.3",
        "kakeya eval --model tiny --html out.html",
    ):
        assert expected in page.text, expected


def test_page_needs_nothing_else():
    text = render(make_result(make_run()))
    for word in ("<script", "<link", "http:", "https:", "url(", "@import", "src="):
        assert word not in text
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def test_page_is_deterministic():
    result = make_result(make_run(), make_run("other"))
    before = copy.deepcopy(result)
    assert render(result) == render(json.loads(json.dumps(result)))
    assert result == before


@pytest.mark.parametrize("count", [1, 2, 12, 20])
def test_every_run_is_in_every_part(count):
    runs = [make_run(f"run<{i}>", 0.001 * 1.7**i, ratio=2 + i / 5) for i in range(count)]
    page = check(make_result(*runs))
    # The passages of each run, then position, K, V and the ratio.
    assert page.count("svg", **{"class": "plot"}) == page.count("figcaption") == count + 4
    assert page.count("polyline") == 3 * count
    looks = {(a["class"], a["stroke-dasharray"]) for t, a in page.elements if t == "polyline"}
    assert len(looks) == min(count, 18)
    for i in range(count):
        # Two tables of runs, the title and name of its plot, three legends with their tables, and
        # the label in the plot of ratios.
        assert page.words.count(f"run<{i}>") == 9
        assert page.words.count(f"Δppl per passage: run<{i}>") == 2


def test_every_plot_has_a_title():
    page = check(make_result(make_run()))
    plots = [i for i, (tag, a) in enumerate(page.elements) if a.get("class") == "plot"]
    assert len(plots) == 5
    assert all(page.elements[i + 1][0] == "title" for i in plots)
    assert all(page.elements[i][1]["role"] == "img" for i in plots)


def test_labels_of_close_points_do_not_overlap():
    runs = [make_run(f"recipe {i}", 0.01 + 1e-5 * i) for i in range(6)]
    page = Page(render(make_result(*runs)))
    labels = [a for t, a in page.elements if t == "text" and a["class"] == ""]
    places = {(a["x"], a["y"]) for a in labels}
    assert len(labels) == len(places) == 6


def test_strings_are_escaped_everywhere():
    run = make_run(HOSTILE, kind=HOSTILE, verdict=HOSTILE, codec={HOSTILE: HOSTILE})
    result = make_result(run, make_run(HOSTILE, ratio=None))
    result["settings"] = dict.fromkeys(result["settings"], HOSTILE) | {HOSTILE: {HOSTILE: 1}}
    result["versions"] = {HOSTILE: HOSTILE}
    result["reference"]["label"] = HOSTILE
    text = render(result)
    text.encode()
    assert "<script" not in text
    assert "\x00" not in text
    page = check(result)
    assert {"script", "alert"}.isdisjoint(tag for tag, _ in page.elements)
    assert "<script>alert('x')</script>\"&" in page.text
    known = {"x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "points", "class", "stroke", "fill"}
    known |= {"stroke-width", "stroke-dasharray", "text-anchor", "viewbox", "role", "aria-hidden"}
    known |= {"lang", "charset", "name", "content", "scope"}
    assert {name for _, attributes in page.elements for name in attributes} <= known


def test_no_runs():
    page = check(make_result())
    assert "no runs" in page.text
    assert "bf16" in page.text
    assert page.count("svg") == 0


@pytest.mark.parametrize("key", sorted(make_run()))
@pytest.mark.parametrize("value", [None, "missing", {}, []])
def test_keys_of_a_run_are_optional(key, value):
    run = make_run()
    if value == "missing":
        del run[key]
    else:
        run[key] = value
    check(make_result(run, make_run("whole")))


@pytest.mark.parametrize("key", sorted(make_run()["quality"]))
@pytest.mark.parametrize("value", [None, NAN, INF, -INF, 0, 0.0, -1e-9, 1e-320, 1e300, 10**400, ""])
def test_figures_may_be_anything(key, value):
    run = make_run()
    run["quality"][key] = value
    check(make_result(run))
    run["quality"][key] = [value, value]
    check(make_result(run))


def test_empty_objects():
    assert "no runs" in check({}).text
    assert "run 1" in check({"runs": [{}]}).text
    assert "run 2" in check({"runs": [None, 3], "settings": [], "versions": None}).text


@pytest.mark.parametrize("value", [0.0, -1e-7, 1e-12, 5e-324, 0.3, 1e99, NAN, INF, None])
@pytest.mark.parametrize("count", [1, 2, 64])
def test_series_of_one_value(value, count):
    run = make_run(kl_by_position=[value] * count, layer_error={"k": [value] * count, "v": []})
    run["per_passage"]["delta_ppl"] = [value] * count
    run["quality"] |= {"kl_mean": value, "kl_mean_95": [value, value], "delta_ppl": value}
    page = check(make_result(run))
    drawable = value is not None and math.isfinite(value)
    assert page.count("figure") == 4 * drawable
    if not drawable:
        assert page.count("polyline") == 0


def test_log_scale_where_the_range_asks_for_it():
    near = check(make_result(make_run("a", 0.01), make_run("b", 0.02)))
    far = check(make_result(make_run("a", 0.0001), make_run("b", 2.0)))
    for page, scale in ((near, "Linear scale."), (far, "Log scale.")):
        # The heading, the title of the drawing, then its caption and its table.
        assert scale in page.text.split("KL over position")[2].split("Means by")[0]


def test_zero_on_a_log_scale_is_at_the_lower_edge():
    run = make_run(kl_by_position=[0.0, 1e-4, 1.0, -1e-9])
    page = check(make_result(run, make_run("exact", 0.0, layer_error=None)))
    assert "0 among them, are at the lower edge" in page.text
    assert "Hollow, at the lower edge" in page.text
    assert page.count("circle", fill="none") == 1
    path = next(a["points"] for t, a in page.elements if t == "polyline")
    heights = [float(point.split(",")[1]) for point in path.split()]
    assert heights[0] == heights[3] == 264.0
    assert heights[0] > heights[1] > heights[2]


def test_lines_break_where_values_are_not_finite():
    page = check(make_result(make_run(kl_by_position=[0.1, 0.1, NAN, 0.1, 0.1, None, 0.1])))
    # Two pieces and a single point, K and V.
    assert page.count("polyline") == 2 + 2
    assert "Lines break" in page.text
    run = make_run()
    run["per_passage"]["delta_ppl"][1] = NAN
    page = check(make_result(run))
    assert "passages: 4, not finite: 1." in page.text


def test_runs_without_a_ratio_are_named():
    page = check(make_result(make_run(), make_run("simulated <k>", ratio=None, cache=None)))
    assert "not drawn: simulated <k>." in page.text


@pytest.mark.parametrize(
    ("delta", "shown"),
    [
        (0.0, "0.00 %"),
        (0.000012, "+0.0012 %"),
        (-0.00994, "−0.99 %"),
        (0.215, "+21.50 %"),
        (12.5, "+1,250 %"),
        (3e20, "+3.0e22 %"),
        (NAN, "nan"),
        (INF, "inf"),
        (None, "–"),
    ],
)
def test_percentages_have_sensible_digits(delta, shown):
    run = make_run()
    run["quality"] |= {"delta_ppl": delta, "delta_ppl_95": None}
    assert f" {shown} " in check(make_result(run)).text


@pytest.mark.parametrize(
    ("kl", "shown"),
    [(0.0, "0"), (0.00052, "5.20e−4"), (-2e-9, "−2.00e−9"), (0.1, "0.100"), (12.345, "12.3")],
)
def test_divergences_have_sensible_digits(kl, shown):
    assert f" {shown} [" in check(make_result(make_run(kl=kl))).text


def test_bytes_of_simulated_caches_carry_a_star():
    stored = {"bytes_per_token": 3791.25, "ratio": 6.08}
    run = make_run("v1.3-bare", ratio=6.08, cache=None, stored=stored)
    page = check(make_result(run, make_run()))
    assert "3,791*" in page.text
    assert "6.08×*" in page.text
