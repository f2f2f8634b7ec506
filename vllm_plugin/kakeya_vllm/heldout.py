"""What a calibration buys: the error of pages on text that it did not see, before and after.

Passages of the calibration text that took no part in the statistics run through the model once
more. Every layer's keys and values are sealed and opened (through the C ABI, as an engine would)
with a recipe and with its calibration-free twin: the same ratio, the same quantiser, no tables.

Relative errors, root of summed squares over summed squares of the values, for every layer:

    output   what attention gives every 64th query of a passage's second half, K and V from pages
    k_seen   keys, each channel weighted by the calibration's E[q^2]
    k, v     keys and values as they are

The first is what a model notices. The others say where it comes from, but weigh all tokens alike,
while attention rests on few. Keys are compared before RoPE. There E[q^2] belongs to a channel; over
the distances at which a query may look back, the two channels of a pair share theirs by how far
they turn.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import Any

import torch

from kakeya_vllm import engine, lib
from kakeya_vllm.evaluation.simulate import PageCoder
from kakeya_vllm.runtime import codec_of
from kakeya_vllm.support import UnsupportedFeature

STREAMS = {"output": "attention's output", "k_seen": "K as queries weigh it", "k": "K", "v": "V"}
# The calibration-free twin of a recipe begins with this one.
FREE_BASE = "kakeya-free-4.6x"
# Distances over which a query's channels mix; the codec's own width allocation takes these.
QUERY_SPAN = 2048
# Of the queries whose attention is compared: far from the keys of the first half, and few.
QUERY_STRIDE = 64


def recipe_of_ratio(ratio: float) -> str:
    """The calibrated recipe of a capacity ratio: the preset if there is one, else a modified one.
    Raises KakeyaError with the valid range."""
    library, name = lib.load(), f"kakeya-{ratio:.1f}x"
    if ratio == round(ratio, 1) and name in library.recipe_names():
        return name
    recipe = json.dumps({"base": "kakeya-4.6x", "ratio": ratio, "name": f"kakeya-{ratio:g}x"})
    library.recipe_describe(recipe)
    return recipe


def free_twin(recipe: str) -> str:
    """The same ratio and quantiser without calibration, as recipe JSON."""
    about = lib.load().recipe_describe(recipe)
    return json.dumps(
        {
            "base": FREE_BASE,
            "name": f"{about['name']} without calibration",
            **{field: about[field] for field in ("ratio", "quantizer", "menu")},
        }
    )


def weight_of_channels(q_sq: torch.Tensor, unrotate: Any) -> torch.Tensor:
    """E[q^2] [H, D] before RoPE -> the weight of a key's error there: members of a pair keep the
    mean of cos^2 of the angles that they turn by, and take the rest from each other."""
    weight = q_sq.double().to(unrotate.frequency.device)
    distance = torch.arange(QUERY_SPAN, device=weight.device)[:, None]
    share = (distance * unrotate.frequency).cos().square().mean(0)
    a, b = weight[:, unrotate.first], weight[:, unrotate.second]
    mixed = weight.clone()
    mixed[:, unrotate.first] = share * a + (1 - share) * b
    mixed[:, unrotate.second] = share * b + (1 - share) * a
    return mixed


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, scale: float
) -> torch.Tensor:
    """Outputs [n, H, G, D] in float64 of the queries at positions ``at`` [n]: q [tokens, H, G, D],
    k and v [tokens, H, D]."""
    logits = torch.einsum("nhgd,thd->nhgt", q[at].double(), k.double()) * scale
    future = torch.arange(len(k), device=k.device) > at[:, None]
    weights = logits.masked_fill(future[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("nhgt,thd->nhgd", weights, v.double())


class Sums:
    """Squares of errors and of values [layers], for each stream."""

    def __init__(self, layers: int) -> None:
        self.error = {stream: [0.0] * layers for stream in STREAMS}
        self.value = {stream: [0.0] * layers for stream in STREAMS}

    def add(self, stream: str, layer: int, error: torch.Tensor, value: torch.Tensor) -> None:
        """Errors and values of the same rows, in float64, with any weights on them."""
        self.error[stream][layer] += float(error.square().sum())
        self.value[stream][layer] += float(value.square().sum())

    def relative(self) -> dict[str, list[float]]:
        """By layer. A layer whose values are all zero has no error either."""
        return {
            stream: [
                (e / v) ** 0.5 if v else 0.0
                for e, v in zip(self.error[stream], self.value[stream], strict=True)
            ]
            for stream in STREAMS
        }


class HeldOut:
    """One recipe's codecs before and after, in the engine that calibrates.

    Made before the calibration runs: a model or a recipe that the codec refuses is refused then.
    """

    def __init__(self, llm: Any, recipe: str) -> None:
        self.llm, self.recipe = llm, recipe
        if not lib.load().recipe_describe(recipe)["needs_calibration"]:
            raise SystemExit(f"kakeya: recipe {recipe} takes no calibration; choose another")
        self.before = self._codec(free_twin(recipe), None)

    def _codec(self, recipe: str, artefact: bytes | None) -> lib.Codec:
        config = self.llm.llm_engine.vllm_config

        def make(model: Any) -> lib.Codec:
            names = [name for _, name, _ in engine.compressed_layers(model)]
            return codec_of(model, names, config, recipe, artefact)

        try:
            return engine.on_model(self.llm, make)
        except (lib.KakeyaError, UnsupportedFeature) as error:
            raise SystemExit(f"kakeya: {getattr(error, 'text', error)}") from error

    def codec(self, artefact: bytes) -> lib.Codec:
        """The recipe's codec with a calibration; SystemExit with the reason if it is refused."""
        return self._codec(self.recipe, artefact)

    def measure(
        self, capture: Any, q_sq: torch.Tensor, after: lib.Codec, passages: list[list[int]]
    ) -> dict[str, Any]:
        """Errors on ``passages`` (whole blocks each), ready for JSON; see :func:`summary`.

        ``capture``: calibrate.Capture, for the layers and their rotary embedding; ``q_sq``:
        [layers, H, D].
        """
        coders = {"before": PageCoder(self.before), "after": PageCoder(after)}
        sums = {name: Sums(len(capture.layers)) for name in coders}
        unrotate, shape = capture.unrotate, capture.shape

        def rows_of(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
            heads, query_heads, dim = shape
            k, v = key.reshape(-1, heads, dim), value.reshape(-1, heads, dim)
            q = query.reshape(-1, heads, query_heads // heads, dim)
            at = torch.arange(len(k) // 2 + QUERY_STRIDE, len(k), QUERY_STRIDE, device=k.device)
            scale = capture.layers[index][1].impl.scale
            output = attention(q, k, v, at, scale)
            number = capture.numbers[index]
            root = weight_of_channels(q_sq[number], unrotate).sqrt()
            flat = unrotate(k)
            for name, coder in coders.items():
                k_new, v_new = coder.round_trip(number, k, v, len(k) // lib.BLOCK_TOKENS)
                difference = attention(q, k_new, v_new, at, scale) - output
                sums[name].add("output", index, difference, output)
                error = unrotate(k_new.double() - k.double())
                sums[name].add("k_seen", index, error * root, flat * root)
                sums[name].add("k", index, error, flat)
                sums[name].add("v", index, v_new.double() - v.double(), v.double())

        with _observed(capture.layers, rows_of):
            for passage in passages:
                engine.run_prompt(self.llm, passage)
        errors = {name: found.relative() for name, found in sums.items()}
        return {
            "recipe": after.describe()["name"],
            "tokens": sum(map(len, passages)),
            "streams": {
                stream: {name: summary(errors[name][stream]) for name in coders}
                for stream in STREAMS
            },
        }


@contextlib.contextmanager
def _observed(layers: list[tuple[str, Any]], function: Any):
    """``function(layer index, query, key, value)`` before every forward of the attention layers."""

    def hook_of(index: int):
        def hook(_module: Any, args: tuple, kwargs: dict) -> None:
            names = ("query", "key", "value")
            values = dict(zip(names, args, strict=False)) | kwargs
            function(index, *(values[name] for name in names))

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(index), with_kwargs=True)
        for index, (_, module) in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def summary(by_layer: list[float]) -> dict[str, Any]:
    """Mean over layers, the worst one and where it is, and all of them, to five digits."""
    worst = max(range(len(by_layer)), key=by_layer.__getitem__)
    return {
        "mean": round(sum(by_layer) / len(by_layer), 5),
        "worst": round(by_layer[worst], 5),
        "worst_layer": worst,
        "by_layer": [round(x, 5) for x in by_layer],
    }


def error_lines(found: dict[str, Any]) -> list[str]:
    """What :meth:`HeldOut.measure` found, as a table."""
    columns = {"before": "calibration-free", "after": "calibrated"}
    lines = [
        f"{found['recipe']} on {found['tokens']:,} tokens of text that took no part, relative "
        "error (mean over layers, worst layer):",
        f"  {'':22}" + "".join(f"  {title:24}" for title in columns.values()),
    ]
    for stream, label in STREAMS.items():
        cells = [
            f"{100 * x['mean']:5.2f} %, {100 * x['worst']:.2f} % in {x['worst_layer']}"
            for x in (found["streams"][stream][name] for name in columns)
        ]
        lines.append(f"  {label:22}" + "".join(f"  {cell:24}" for cell in cells))
    return [line.rstrip() for line in lines]


def allocation_lines(about: dict[str, Any]) -> list[str]:
    """What a codec (Codec.describe) gives its bits to: bytes of a page, bits by stream, slots."""
    layers = about["layers"]
    slots = Counter(layer["slots"] for layer in layers)
    lines = [
        f"{about['name']}: {about['page_bytes']} B a page of {about['block_tokens']} tokens and "
        f"one KV head, {about['ratio']:.2f}x, {about['bits_per_element']:.2f} bits an element",
        "  exact tokens a page     "
        + ", ".join(f"{n} in {count} layers" for n, count in sorted(slots.items())),
    ]
    for stream in "kv":
        widths = [
            w for layer in layers for head in layer["widths"] for w in head[f"{stream}_widths"]
        ]
        counts = Counter(widths)
        shares = ", ".join(f"{w}: {100 * counts[w] / len(widths):.0f} %" for w in sorted(counts))
        mean = sum(widths) / len(widths)
        lines.append(f"  bits a channel of {stream.upper()}     {mean:.2f} ({shares} of channels)")
    return lines
