"""`kakeya bench MODEL`: caches side by side on this machine and model, and where KAKEYA loses.

For each cache, an engine in a process of its own:

* tokens of capacity;
* time to the first token of one prompt, for each context of the cells: median of ``repeats`` runs;
* for each cell (batch x context): the batch is prefilled (tokens a second), then all sequences
  decode; milliseconds a token are the median of the steps in which all do, tokens a second follow.

Prompts are arbitrary tokens and no two share a prefix; weights may be random (``--dummy``): times
and sizes are those of the shapes. Ratios are against the first cache, above 1 is better.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tokens of a step: the budget that prefill and decoding share.
STEP_TOKENS = 8192
# Prefill and first tokens within 5 % are as good; a token of decoding has to be no slower.
PREFILL_BOUND = 0.95
# key -> (title, whether more is better, least ratio that does not lose).
KINDS = {
    "capacity": ("capacity, tokens", True, 1.0),
    "first_token_ms": ("first token, ms", False, PREFILL_BOUND),
    "prefill_tokens_a_s": ("prefill, tokens/s", True, PREFILL_BOUND),
    "ms_a_token": ("a token, ms", False, 1.0),
    "tokens_a_s": ("decoding, tokens/s", True, 1.0),
}
# Begins a line of a process that measures; JSON follows.
RESULT = "RESULT "


def cells(text: str) -> list[tuple[int, int]]:
    """``64x8192,1x8192``: batch x context of each; ValueError names what is none."""
    found = []
    for cell in text.split(","):
        batch, _, context = cell.strip().partition("x")
        if not (batch.isdigit() and context.isdigit() and int(batch) and int(context)):
            raise ValueError(f"{cell!r} is not a cell; valid: batch x context, such as 64x8192")
        found.append((int(batch), int(context)))
    return found


def growth(batch: int, context: int, decoded: int) -> int:
    """Tokens that the first sequence of a batch decodes until all have decoded ``decoded``.

    While the rest is prefilled, those that are through decode a token a step, out of the same
    budget of tokens.
    """
    return math.ceil(batch * context / max(1, STEP_TOKENS - batch)) + decoded + 16


def prompt(seed: int, length: int, vocabulary: int = 150000) -> dict[str, list[int]]:
    """Any tokens; no two seeds share a prefix."""
    ids = [(7919 * seed + 13 * j + j // 97) % vocabulary for j in range(length)]
    return {"prompt_token_ids": ids}


class Steps:
    """Requests through an engine, one step at a time."""

    def __init__(self, llm: Any, vocabulary: int = 150000) -> None:
        self.engine = llm.llm_engine
        self.vocabulary = vocabulary
        self.seed = 0

    def prompts(self, count: int, length: int) -> dict[str, dict[str, list[int]]]:
        """Prompts that no earlier request had, by a request's name."""
        first, self.seed = self.seed, self.seed + count
        return {
            f"request-{seed}": prompt(seed, length, self.vocabulary)
            for seed in range(first, self.seed)
        }

    def add(self, prompts: dict[str, dict[str, list[int]]], max_tokens: int) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        for name, tokens in prompts.items():
            self.engine.add_request(name, tokens, parameters)

    def step(self, counts: dict[str, int]) -> None:
        """One step; ``counts`` follows the tokens of every request."""
        for output in self.engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)

    def finish(self, counts: dict[str, int]) -> None:
        while self.engine.has_unfinished_requests():
            self.step(counts)

    def prefill_s(self, count: int, length: int) -> float:
        """Seconds until each of ``count`` prompts has its first and only token."""
        prompts = self.prompts(count, length)
        start = time.perf_counter()
        self.add(prompts, 1)
        self.finish({})
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int) -> dict[str, float]:
        """Prefill a batch, then decode until ``steps`` steps gave every sequence a token."""
        prompts = self.prompts(batch, context)
        began = time.perf_counter()
        self.add(prompts, growth(batch, context, steps))
        counts: dict[str, int] = {}
        while len(counts) < batch:
            self.step(counts)
        last = prefilled = time.perf_counter()
        times = []
        while len(times) < steps and self.engine.has_unfinished_requests():
            before = sum(counts.values())
            self.step(counts)
            new, now = sum(counts.values()) - before, time.perf_counter()
            if new == batch:
                times.append(1e3 * (now - last))
            if new:  # an engine that schedules ahead may return without tokens
                last = now
        if len(times) < steps:
            raise RuntimeError(f"only {len(times)} of {steps} steps decoded all {batch} sequences")
        self.engine.abort_request(list(prompts))
        self.finish(counts)
        # The first steps may still hold what prefill left to do.
        median = statistics.median(times[len(times) // 4 :])
        return {"ms_a_token": round(median, 3), "prefill_s": round(prefilled - began, 4)}


# ---- one engine -----------------------------------------------------------------------------


def engine(spec: dict[str, Any]) -> Any:
    """One engine with one cache, large enough for all that is measured."""
    from vllm import LLM

    from kakeya_vllm.engine import speed_up_bf16

    speed_up_bf16()
    wanted, steps = spec["cells"], spec["steps"]
    longest = max(context + growth(batch, context, steps) for batch, context in wanted)
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_seqs": max(batch for batch, _ in wanted),
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_prefix_caching": False,
        "seed": 0,
        "disable_log_stats": True,
    }
    if spec["dummy"]:
        settings["load_format"] = "dummy"
    cache = spec["cache"]
    if cache == "kakeya":
        settings["attention_backend"] = "KAKEYA"
    elif cache not in STOCK:
        settings["attention_backend"] = "KAKEYA"
        settings["additional_config"] = {"kakeya": {"recipe": cache}}
    elif cache != "bf16":
        settings["kv_cache_dtype"] = cache
    return LLM(spec["model"], **(settings | spec["options"]))


# vLLM's own caches by the names of this command; "bf16" is the model's own type.
STOCK = ("bf16", "fp8", "fp8_e5m2", "int8_per_token_head", "int4_per_token_head")


def measure(spec: dict[str, Any]) -> None:
    """Measure one cache in this process; every result is a line, so that those before a failure
    count."""

    def result(name: str, **values: Any) -> None:
        print(RESULT + json.dumps({"name": name, **values}), flush=True)

    llm = engine(spec)
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    capacity = cache.num_gpu_blocks * cache.block_size
    result("", capacity=capacity)
    steps = Steps(llm, config.model_config.get_vocab_size() - 16)
    steps.decode(min(2, config.scheduler_config.max_num_seqs), 64, 4)  # compiles at first use
    for context in sorted({context for _, context in spec["cells"]}):
        times = [steps.prefill_s(1, context) for _ in range(spec["repeats"])]
        result(f"1x{context}", first_token_ms=round(1e3 * statistics.median(times), 2))
    for batch, context in spec["cells"]:
        name = f"{batch}x{context}"
        blocks = -(-(context + growth(batch, context, spec["steps"])) // cache.block_size)
        if batch * blocks * cache.block_size > capacity:
            result(name, does_not_fit=True)
            continue
        found = steps.decode(batch, context, spec["steps"])
        result(
            name,
            ms_a_token=found["ms_a_token"],
            tokens_a_s=round(1e3 * batch / found["ms_a_token"], 1),
            prefill_tokens_a_s=round(batch * context / found["prefill_s"], 1),
        )


def results_of(
    command: list[str], environment: dict[str, str], timeout: float, take: Callable[[str], None]
) -> dict[str, Any] | None:
    """Run an engine in a process of its own, since engines do not give all memory back, and hand
    every line of a result to ``take`` as JSON. None, or why it failed and its last lines."""
    tail: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        # A timer, because a hung engine prints nothing.
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith(RESULT):
                take(line.removeprefix(RESULT))
            else:
                tail = [*tail[-40:], line]
        code = process.wait()
        timer.cancel()
    if not code:
        return None
    why = f"exit {code}" if code > 0 else f"killed after {timeout:g} s or by a signal"
    return {"why": why, "output": "".join(tail)}


def run(spec: dict[str, Any], timeout: float, advance: Any) -> dict[str, Any]:
    """One cache: {cell: {key: value}}, with the capacity under "" and a failure under "failed".
    ``advance()`` after each measurement."""
    found: dict[str, Any] = {}

    def take(text: str) -> None:
        result = json.loads(text)
        found.setdefault(result.pop("name"), {}).update(result)
        advance()

    command = [sys.executable, "-m", "kakeya_vllm.bench", json.dumps(spec)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    failed = results_of(command, environment, timeout, take)
    return found if failed is None else found | {"failed": failed}


# ---- results --------------------------------------------------------------------------------


def ratio(key: str, value: float, base: float) -> float:
    """How many times as good as the base."""
    return value / base if KINDS[key][1] else base / value


def lost(results: dict[str, dict[str, Any]]) -> list[str]:
    """What each cache loses to the first one, in words."""
    names = list(results)
    base = results[names[0]]
    found = []
    for name in names[1:]:
        for cell, values in results[name].items():
            for key, value in values.items():
                other = base.get(cell, {}).get(key)
                if key not in KINDS or not other:
                    continue
                better = ratio(key, value, other)
                if better < KINDS[key][2]:
                    place = f" at {cell}" if cell else ""
                    found.append(f"{name}: {KINDS[key][0]}{place}, {better:.2f}x {names[0]}")
    return found


def rows(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: a row a cache, a column a measurement, ratios to the first."""
    names = list(results)
    columns: list[tuple[str, str]] = []
    for found in results.values():
        for cell, values in found.items():
            columns += [
                (cell, key) for key in values if key in KINDS and (cell, key) not in columns
            ]
    columns.sort(
        key=lambda c: (list(KINDS).index(c[1]), tuple(map(int, c[0].split("x"))) if c[0] else ())
    )
    header = [f"{KINDS[key][0]}{' ' + cell if cell else ''}" for cell, key in columns]
    table = []
    for name in names:
        row = [name]
        for cell, key in columns:
            values, base = results[name].get(cell, {}), results[names[0]].get(cell, {})
            if key not in values:
                row.append("does not fit" if values.get("does_not_fit") else "failed")
                continue
            text = f"{values[key]:,}"
            if name != names[0] and base.get(key):
                text += f" ({ratio(key, values[key], base[key]):.2f}x)"
            row.append(text)
        table.append(row)
    return ["cache", *header], table


def report(result: dict[str, Any]) -> str:
    """The measurements as text, one a line, and what is lost."""
    results = result["caches"]
    header, table = rows(results)
    width = max(map(len, header))
    lines = [result["model"]]
    columns = [max(map(len, row)) for row in table]
    lines.append(
        " " * width + "".join(f"  {r[0]:>{w}}" for r, w in zip(table, columns, strict=True))
    )
    for i, title in enumerate(header[1:], 1):
        cells_ = "".join(f"  {r[i]:>{w}}" for r, w in zip(table, columns, strict=True))
        lines.append(f"{title:<{width}}{cells_}")
    behind = lost(results)
    lines.append("")
    lines += [f"loses: {text}" for text in behind] or ["nothing is lost to the first cache"]
    for name, found in results.items():
        if "failed" in found:
            lines.append(f"{name} failed: {found['failed']['why']}")
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    """The same as one page of HTML: table, plots of each measurement over the cells."""
    from kakeya_vllm.evaluation import html

    results = result["caches"]
    header, table = rows(results)
    runs = {name: html.Run(i, {"label": name}) for i, name in enumerate(results)}
    body = html._table(
        [html._text(x) for x in header],
        [[html._text(x) for x in row] for row in table],
        "All cells",
    )
    order = [f"{batch}x{context}" for batch, context in result["cells"]]
    legend = f'<ul class="legend">{"".join(f"<li>{run.key}</li>" for run in runs.values())}</ul>'
    for key in ("ms_a_token", "tokens_a_s", "prefill_tokens_a_s"):
        curves = {n: [found.get(c, {}).get(key) for c in order] for n, found in results.items()}
        values = [v for curve in curves.values() for v in curve if v]
        if not values:
            continue
        x, y = html._index(1, len(order)), html._log(values)
        plot = html.Plot(KINDS[key][0], x, y, ("cell", KINDS[key][0]))
        for name, curve in curves.items():
            plot.curve(1, curve, runs[name])
        cells_ = ", ".join(f"{i}: {cell}" for i, cell in enumerate(order, 1))
        body += plot.figure(f"Cells (batch x context): {cells_}. Log scale.", legend)
    behind = lost(results) or ["nothing is lost to the first cache"]
    body += "<h2>Lost</h2><ul>" + "".join(f"<li>{html._text(t)}</li>" for t in behind) + "</ul>"
    about = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    title = html._text(f"kakeya bench: {result['model']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{html.STYLE}</style><h1>{title}</h1><p>{html._text(about)}</p>{body}</html>\n"
    )


def bench_command(args: Any) -> int:
    """`kakeya bench`: 0, or 1 if an engine failed."""
    from tqdm import tqdm

    from kakeya_vllm.evaluation.command import versions, write_json
    from kakeya_vllm.progress import write_atomically

    try:
        wanted = cells(args.cells) if args.cells else default_cells()
    except ValueError as error:
        raise SystemExit(f"kakeya: {error}") from None
    caches = args.caches or default_caches()
    total = len(caches) * (1 + len({context for _, context in wanted}) + len(wanted))
    result: dict[str, Any] = {
        "model": args.model,
        "cells": wanted,
        "versions": versions() | {"device": device()},
        "caches": {},
    }
    with tqdm(total=total, unit="measurement") as bar:
        for cache in caches:
            bar.set_description(cache)
            spec = {
                "model": args.model,
                "cache": cache,
                "cells": wanted,
                "steps": args.steps,
                "repeats": args.repeats,
                "dummy": args.dummy,
                "options": args.options,
            }
            result["caches"][cache] = run(spec, args.timeout, bar.update)
    print(report(result))
    if args.json:
        write_json(args.json, result)
    if args.html:
        write_atomically(Path(args.html), page(result).encode("utf-8"))
    failed = {name: f["failed"] for name, f in result["caches"].items() if "failed" in f}
    for name, why in failed.items():
        print(f"\n{name}: the engine's last lines\n{why['output']}", file=sys.stderr)
    return 1 if failed else 0


def default_cells() -> list[tuple[int, int]]:
    """Small ones without a GPU, where a step takes long."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return [(1, 8192), (16, 8192), (64, 8192)]
    return [(1, 512), (4, 512)]


def default_caches() -> list[str]:
    """bf16, fp8 where the platform has it, and what KAKEYA would choose."""
    from vllm.platforms import current_platform

    return ["bf16", *(["fp8"] if current_platform.is_cuda() else []), "kakeya"]


def device() -> str:
    """What the engines run on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{os.cpu_count()} CPU cores"


if __name__ == "__main__":
    from kakeya_vllm.engine import prepare_environment

    prepare_environment()
    measure(json.loads(sys.argv[1]))
