"""The result of ``kakeya eval`` as one HTML page.

The page stands alone: no script, no external resource, plots as inline SVG. Every plot repeats its
numbers as text. The result may come from a file, so any key may be missing, any number null, NaN
or infinite, and any string hostile; what cannot be drawn is left out, and the page says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from itertools import groupby, pairwise, product
from statistics import fmean
from typing import Any

# A run has one of six colours, told apart with common colour blindness, and from the seventh run on
# dashes as well: no two of 18 runs look alike.
COLOURS = 6
DASHES = ("none", "7 3", "2 3")
# Rounding alone makes a KL this large; a log axis need not reach below.
LOG_FLOOR = 1e-9
# Ends of a log axis further apart than this: on a linear axis the small values would look like 0.
LOG_RANGE = 100.0
# A larger value is as good as infinite, and the arithmetic of an axis could overflow.
DRAWABLE = 1e100
LABEL_LENGTH = 32
NONE = "–"
# Between a number and its sign.
NBSP = "\u00a0"
RULE = f"""ACCEPT: |Δppl| ≤ 1{NBSP}% and top-1 ≥ 95{NBSP}%. MARGINAL: |Δppl| ≤ 20{NBSP}% and
top-1 ≥ 74{NBSP}%. REJECT: anything else. A verdict is decided on means over enough passages: the
half-width of the 95{NBSP}% interval of Δppl is at most 0.5{NBSP}%, or every value in the interval
leads to the same verdict. UNDECIDED: the passages are too few."""
PASSAGES = f"""Each plot has its own scale. Dotted: ±1{NBSP}%, the limits of ACCEPT. Dashed: the
mean, which is Δppl of all passages together."""
STYLE = """:root{color-scheme:light dark;--ink:#1c1c1c;--soft:#5a5a5a;--line:#d4d4d4;--page:#fff;
--good:#006b3f;--fair:#7a5200;--bad:#b00020;
--c0:#0067a5;--c1:#c04a00;--c2:#00775a;--c3:#a03070;--c4:#806000;--c5:#5b4fc4}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#a8a8a8;--line:#444;
--page:#161616;--good:#55d09a;--fair:#e8b84a;--bad:#ff7a85;
--c0:#5cb8f0;--c1:#ff9050;--c2:#3ecfa0;--c3:#f080c0;--c4:#e0c040;--c5:#a9a0ff}}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}
.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.ACCEPT{color:var(--good)}.MARGINAL{color:var(--fair)}.REJECT{color:var(--bad)}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:76rem;
margin:2rem auto;padding:0 1rem}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}
h3{font-size:.95rem;margin:.2rem 0}p{max-width:52rem}h1,h3,li,pre{overflow-wrap:anywhere}
.scroll{overflow-x:auto}caption{text-align:left;color:var(--soft)}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;margin:.8rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
td{white-space:nowrap}th:first-child{text-align:left;min-width:13rem;overflow-wrap:anywhere}
.text td{text-align:left;white-space:normal;overflow-wrap:anywhere}
small,figcaption{color:var(--soft);font-weight:400;font-size:.9em}small{display:block}
figure{margin:1rem 0;break-inside:avoid;max-width:52rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:.5rem 1.5rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;list-style:none;padding:0;font-size:.85rem}
svg.plot{display:block;width:100%;height:auto}svg.key{width:26px;height:10px;margin-right:.4rem}
text{font:11px system-ui,sans-serif;fill:var(--ink)}text.axis{fill:var(--soft)}
.rule{stroke:var(--line)}.zero{stroke:var(--ink)}.limit{stroke:var(--good);stroke-dasharray:1 3}
pre{white-space:pre-wrap;border:1px solid var(--line);padding:.6rem}
@media print{@page{margin:12mm}body{margin:0;padding:0;font-size:9pt}table{font-size:6.5pt}
th,td{padding:1pt 3pt}th:first-child{min-width:20mm}.scroll{overflow:visible}
tr{break-inside:avoid}h2,h3,caption{break-after:avoid}}
"""


def _text(value: Any) -> str:
    """Any value as HTML text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict) and value:
        return ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items())
    if value in (None, "", {}):
        return NONE
    # JSON can spell halves of characters and control characters; no page may hold them.
    plain = str(value).encode("utf-8", "replace").decode()
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", plain))


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    """The number, or None where a plot could not show it."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and abs(value) < DRAWABLE else None


def _numbers(values: Any) -> list[float]:
    return [v for v in map(_number, _list(values)) if v is not None]


def _show(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits; whole from 1,000 on."""
    number = _number(value)
    if number is None:
        return f"{value:g}" if isinstance(value, float) else NONE
    if isinstance(value, int) or number == 0 or 999.5 <= abs(number) < 1e15:
        text = f"{number:,.0f}"
    elif 1e-3 <= abs(number) < 999.5:
        text = f"{number:#.{digits}g}".rstrip(".")
    else:
        text = re.sub("e([+-])0*", r"e\1", f"{number:.{digits - 1}e}").replace("+", "")
    return text.replace("-", "−")


def _percent(value: Any, signed: bool = False) -> str:
    """A fraction as a percentage with two decimals, or with more where they would be 0."""
    number = _number(value)
    if number is None:
        return _show(value)
    two = number == 0 or 1e-4 <= abs(number) < 9.995
    text = f"{100 * number:.2f}".replace("-", "−") if two else _show(100 * number, 2)
    return ("+" if signed and number > 0 else "") + text + NBSP + "%"


_signed = partial(_percent, signed=True)


def _with_interval(quality: dict, key: str, show: Callable[[Any], str]) -> str:
    ends = _list(quality.get(f"{key}_95"))
    interval = f"<small>[{show(ends[0])}, {show(ends[1])}]</small>" if len(ends) == 2 else ""
    return show(quality.get(key)) + interval


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table of cells that are HTML; the first of each row is its heading."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    thead = f"<thead><tr>{columns}</tr></thead>\n" if head else ""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for first, *cells in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{caption}</caption>\n{thead}'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers, and the ticks on it."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where on the axis the value lies, from 0 to 1; the ends stand for all beyond them."""
        value = min(max(value, self.low), self.high)
        value, low, high = map(math.log if self.log else float, (value, self.low, self.high))
        return (value - low) / (high - low)


def _step(span: float) -> float:
    """A round step of which six or fewer cover the span."""
    power = 10.0 ** math.floor(math.log10(span / 6))
    return next(m * power for m in (1, 2, 5, 10, 20) if m * power * 6 >= span)


def _linear(values: Iterable[float]) -> Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-200):
        high = low + max(1.0, abs(low))
    step = _step(high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)])


def _log(values: Iterable[float]) -> Axis:
    """Ends at 1, 2 or 5 times a power of ten; 0 and negative values fall on the lower end."""
    positive = [max(v, LOG_FLOOR) for v in values if v > 0] or [LOG_FLOOR]
    low, high = min(positive), max(positive)
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    rounds = [float(f"{m}e{e}") for e in exponents for m in (1, 2, 5)]
    low, high = max(v for v in rounds if v < low), min(v for v in rounds if v > high)
    ticks = [v for v in rounds if low <= v <= high]
    if len(ticks) > 8:
        ticks = [v for v in ticks if f"{v:e}".startswith("1")]
        ticks = ticks[:: math.ceil(len(ticks) / 8)]
    return Axis(low, high, ticks, log=True)


def _index(first: int, last: int) -> Axis:
    """Whole numbers, each in the middle of its place."""
    step = max(1, round(_step(last - first + 1)))
    ticks = [float(i) for i in range(first, last + 1) if i % step == 0]
    return Axis(first - 0.5, last + 0.5, ticks)


class Run:
    """A run of the result, and how it looks in every plot."""

    def __init__(self, index: int, data: Any):
        self.data = _dict(data)
        self.quality = _dict(self.data.get("quality"))
        self.ratio = _number(self.data.get("ratio"))
        self.kl = _number(self.quality.get("kl_mean"))
        self.name = str(self.data.get("label") or f"run {index + 1}")
        self.label = _text(self.name)
        colour, dash = f"c{index % COLOURS}", DASHES[index // COLOURS % len(DASHES)]
        self.ink = f'class="{colour}" stroke="currentColor"'
        self.line = f'{self.ink} fill="none" stroke-width="1.6" stroke-dasharray="{dash}"'
        self.dot = f'class="{colour}" fill="currentColor"'
        self.key = (
            '<svg class="key" aria-hidden="true" viewBox="0 0 26 10">'
            f'<line x1="0" y1="5" x2="26" y2="5" {self.line}/></svg>{self.label}'
        )


@dataclass
class Plot:
    """An SVG plot. Title and labels are HTML; ``show`` prints the ticks of the y axis."""

    title: str
    x: Axis
    y: Axis
    labels: tuple[str, str]
    width: int = 760
    height: int = 300
    show: Callable[[float], str] = "{:.6g}".format
    body: list[str] = field(default_factory=list)
    LEFT, RIGHT, TOP, BOTTOM = 62, 14, 22, 36

    def px(self, value: float) -> float:
        return self.LEFT + self.x.fraction(value) * (self.width - self.LEFT - self.RIGHT)

    def py(self, value: float) -> float:
        height = self.height - self.TOP - self.BOTTOM
        return self.TOP + (1 - self.y.fraction(value)) * height

    def line(self, x1: float, y1: float, x2: float, y2: float, look: str) -> None:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.body.append(f"<line {ends} {look}/>")

    def across(self, value: float, look: str) -> None:
        """A horizontal line at a value."""
        self.line(self.LEFT, self.py(value), self.width - self.RIGHT, self.py(value), look)

    def dot(self, x: float, y: float, look: str, radius: float = 2.2) -> None:
        centre = f'cx="{self.px(x):.1f}" cy="{self.py(y):.1f}"'
        self.body.append(f'<circle {centre} r="{radius}" {look}/>')

    def text(self, x: float, y: float, html: str, anchor: str, kind: str = "axis") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.body.append(f'<text {place} class="{kind}">{html}</text>')

    def curve(self, first: int, values: list, run: Run) -> None:
        """A line through the values; it breaks where one cannot be drawn."""
        numbers = enumerate(map(_number, values), first)
        for drawn, part in groupby(numbers, key=lambda point: point[1] is not None):
            points = list(part)
            if drawn and len(points) == 1:
                self.dot(*points[0], run.dot)
            elif drawn:
                path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
                self.body.append(f'<polyline points="{path}" {run.line}/>')

    def figure(self, caption: str, legend: str = "") -> str:
        """The figure; its axes are drawn under everything else."""
        shapes, self.body, floor = self.body, [], self.height - self.BOTTOM
        for tick in self.y.ticks:
            self.across(tick, 'class="rule"')
            shown = re.sub(r"e(-?)\+?0*", r"e\1", self.show(tick)).replace("-", "−")
            self.text(self.LEFT - 6, self.py(tick) + 4, shown, "end")
        for tick in self.x.ticks:
            self.line(self.px(tick), floor, self.px(tick), floor + 4, 'class="rule"')
            self.text(self.px(tick), floor + 16, f"{tick:.6g}", "middle")
        self.text((self.LEFT + self.width) / 2, self.height - 5, self.labels[0], "middle")
        self.text(2, 12, self.labels[1], "start")
        svg = "\n".join([f"<title>{self.title}</title>", *self.body, *shapes])
        return (
            f'<figure><h3>{self.title}</h3>\n{legend}<svg class="plot" role="img" '
            f'viewBox="0 0 {self.width} {self.height}">{svg}</svg>\n'
            f"<figcaption>{caption}</figcaption></figure>\n"
        )


def _summary(reference: dict, runs: list[Run]) -> str:
    """The table of all runs, the rule of the verdict, and what else is known of each run."""
    size = _show(_dict(reference.get("cache")).get("bytes_per_token"), 4)
    name = f"{_text(reference.get('label', 'reference'))}<small>reference</small>"
    rows, details = [[name, size, "1×", _show(reference.get("ppl"), 4), *[NONE] * 6]], []
    for run in runs:
        data, q, cache = run.data, run.quality, _dict(run.data.get("cache"))
        stored, verdict = _dict(data.get("stored")), data.get("verdict")
        star = "*" if stored else ""
        size = _show((stored or cache).get("bytes_per_token"), 4) + star
        ratio = _show(data.get("ratio")) + ("" if run.ratio is None else f"×{star}")
        row = [f"{run.key}<small>{_text(data.get('kind'))}</small>", size, ratio]
        row += [_show(q.get("ppl"), 4), _with_interval(q, "delta_ppl", _signed)]
        row += [_with_interval(q, "top1", _percent), _with_interval(q, "kl_mean", _show)]
        row += [_show(q.get("kl_median")), _show(q.get("kl_99.9"))]
        row += [f'<strong class="{_text(verdict)}">{_text(verdict)}</strong>']
        rows.append(row)
        counts = [("passages", q), ("predictions", q), ("capacity_tokens", cache)]
        counts += [("open_blocks_bytes", data)]
        about = {name.replace("_", " "): _show(found.get(name)) for name, found in counts}
        codec = {f"codec {key}": value for key, value in _dict(data.get("codec")).items()}
        details.append([run.label, _text(about | codec)])
    head = "Run|Bytes a token|Ratio|ppl|Δppl|Top-1|Mean KL|Median KL|KL, 99.9th percentile|Verdict"
    caption = (
        "Ratio: of capacity, all bytes counted, open blocks beside it. Δppl: change of perplexity. "
        "Top-1: share of predictions whose most likely token is the reference’s. KL: KL(reference "
        f"‖ run) over the vocabulary, in nats. In brackets: 95{NBSP}% intervals. *: simulated; "
        "bytes that would be stored, not allocated."
    )
    table = _table(head.split("|"), rows, caption) + f"<p>{RULE}</p>\n"
    return table + _table([], details, "Details of the runs.", "text") if runs else table


def _passage_plot(run: Run) -> str:
    values = _list(_dict(run.data.get("per_passage")).get("delta_ppl"))
    drawn = _numbers(values)
    if not drawn:
        return ""
    mean = _number(run.quality.get("delta_ppl"))
    mean = fmean(drawn) if mean is None else mean
    # The limits of ACCEPT are in every plot: a measure for scales that differ.
    y = _linear([*drawn, mean, -0.01, 0.01])
    labels, title = ("passage", "Δppl"), f"Δppl per passage: {run.label}"
    x = _index(1, len(values))
    plot = Plot(title, x, y, labels, 400, 190, lambda tick: f"{100 * tick:.6g}{NBSP}%")
    for value, kind in ((0, "zero"), (-0.01, "limit"), (0.01, "limit")):
        plot.across(value, f'class="{kind}"')
    for i, value in enumerate(values, 1):
        plot.curve(i, [value], run)
    plot.across(mean, f'{run.ink} stroke-dasharray="5 3"')
    return plot.figure(
        f"Mean {_signed(mean)}, least {_signed(min(drawn))}, most {_signed(max(drawn))}; passages: "
        f"{len(values)}" + (f", not finite: {n}." if (n := len(values) - len(drawn)) else ".")
    )


def _curves(title: str, labels: tuple[str, str], first: int, all_values: dict[Run, list]) -> str:
    """A line per run over positions or layers, and a table of means of up to eight stretches."""
    curves = {run: values for run, values in all_values.items() if _numbers(values)}
    if not curves:
        return ""
    count = max(map(len, curves.values()))
    drawn = [v for values in curves.values() for v in _numbers(values)]
    y = _log(drawn)
    y = y if y.high / y.low > LOG_RANGE else _linear([0.0, *drawn])
    plot = Plot(title, _index(first, first + count - 1), y, labels)
    for run, values in curves.items():
        plot.curve(first, values, run)
    caption = "Log scale." if y.log else "Linear scale."
    if min(drawn) < y.low:
        caption += f" Values below {_show(y.low)}, 0 among them, are at the lower edge."
    if any(len(_numbers(values)) < len(values) for values in curves.values()):
        caption += " Lines break where a value is not finite."
    bounds = [i * count // min(8, count) for i in range(min(8, count) + 1)]
    head = [f"{first + a}" + f"–{first + b - 1}" * (b - a > 1) for a, b in pairwise(bounds)]
    rows = []
    for run, values in curves.items():
        parts = [_numbers(values[a:b]) for a, b in pairwise(bounds)]
        rows.append([run.label, *(_show(fmean(part)) if part else NONE for part in parts)])
    legend = f'<ul class="legend">{"".join(f"<li>{run.key}</li>" for run in curves)}</ul>\n'
    return plot.figure(caption, legend) + _table(["Run", *head], rows, f"Means by {labels[0]}.")


def _trade_off(runs: list[Run]) -> str:
    points = [run for run in runs if run.ratio is not None and run.kl is not None]
    if not points:
        return ""
    intervals = {run: _numbers(run.quality.get("kl_mean_95")) for run in points}
    y = _log([run.kl for run in points] + [end for ends in intervals.values() for end in ends])
    x = _linear([1.0, *(run.ratio for run in points)])
    plot = Plot("Ratio against mean KL", x, y, ("ratio", "mean KL, nats"), height=380)
    taken = [(plot.px(r.ratio) - 7, plot.py(r.kl), plot.px(r.ratio) + 7) for r in points]
    for run in points:
        px, py, bar = plot.px(run.ratio), plot.py(run.kl), [plot.py(v) for v in intervals[run]]
        for end in bar:
            plot.line(px - 4, end, px + 4, end, run.ink)
            plot.line(px, py, px, end, run.ink)
        plot.dot(run.ratio, run.kl, run.dot if run.kl >= y.low else f'{run.ink} fill="none"', 3.2)
        name = run.name if len(run.name) <= LABEL_LENGTH else run.name[: LABEL_LENGTH - 1] + "…"
        # A little wider than any name is set.
        width = 6.6 * len(name)
        left, height = _place(plot, px, py, width, taken)
        taken.append((left, height, left + width))
        x0, anchor = (left, "start") if left > px else (left + width, "end")
        plot.text(x0, height + 4, _text(name), anchor, "")
    caption = f"Right and down is better. Bars: 95{NBSP}% intervals. Log scale."
    if any(run.kl < y.low for run in points):
        caption += f" Hollow, at the lower edge: values below {_show(y.low)}, 0 among them."
    if absent := [run.label for run in runs if run not in points]:
        caption += f" Without a ratio or a finite KL, and so not drawn: {', '.join(absent)}."
    return plot.figure(caption)


def _place(plot: Plot, px: float, py: float, width: float, taken: list) -> tuple[float, float]:
    """Left end and height of a label: beside its point, at the nearest height that is free."""
    sides = [left for left in (px + 9, px - 9 - width) if plot.LEFT < left < plot.width - width]
    sides = sides or [max(plot.LEFT, plot.width - width)]
    for shift, left in product((0, -13, 13, -26, 26, -39, 39, -52, 52), sides):
        height, right = py + shift, left + width
        free = all(b < left or right < a or abs(height - h) > 12 for a, h, b in taken)
        if free and plot.TOP < height <= plot.height - plot.BOTTOM:
            return left, height
    return sides[0], py


def _pairs(values: dict, caption: str) -> str:
    rows = [[_text(str(key).replace("_", " ")), _text(value)] for key, value in values.items()]
    return _table([], rows, caption, "text")


def render(result: dict) -> str:
    """The page of a result of ``kakeya eval``, given as the object that its JSON holds."""
    settings = _dict(result.get("settings"))
    runs = [Run(i, data) for i, data in enumerate(_list(result.get("runs")))]
    title = f"KAKEYA evaluation: {_text(settings.get('model', 'model unknown'))}"
    layers = {run: _dict(run.data.get("layer_error")) for run in runs}
    k, v = ({run: _list(layers[run].get(stream)) for run in runs} for stream in "kv")
    layer_labels = ("compressed layer, in order", "RMS error / RMS value")
    position = f"scored position, after {_show(settings.get('prefix_tokens'))} tokens"
    kl = {run: _list(run.data.get("kl_by_position")) for run in runs}
    passages = "".join(map(_passage_plot, runs))
    sections = {
        "Runs": ("" if runs else "<p>The result has no runs.</p>\n")
        + _summary(_dict(result.get("reference")), runs),
        "Δppl by passage": passages and f'<p>{PASSAGES}</p>\n<div class="grid">{passages}</div>\n',
        "KL by position": _curves("KL over position", (position, "mean KL, nats"), 1, kl),
        "Error by layer": _curves("Relative error of K", layer_labels, 0, k)
        + _curves("Relative error of V", layer_labels, 0, v),
        "Ratio against quality": _trade_off(runs),
        "Versions": _pairs(_dict(result.get("versions")), "What produced the figures."),
        "Command": f"<pre><code>{_text(settings.get('command'))}</code></pre>\n",
    }
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n"
        + _pairs({k: v for k, v in settings.items() if k != "command"}, "Settings.")
        + "".join(f"<h2>{head}</h2>\n{content}" for head, content in sections.items() if content)
        + "</main>\n</body>\n</html>\n"
    )
