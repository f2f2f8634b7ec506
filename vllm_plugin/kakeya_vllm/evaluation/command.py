"""``kakeya eval``: caches side by side on one text, with a verdict for each."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kakeya_vllm import __version__, engine
from kakeya_vllm.evaluation import generation, metrics, protocol, tasks
from kakeya_vllm.evaluation.metrics import TokenFigures
from kakeya_vllm.evaluation.protocol import Cache
from kakeya_vllm.hybrid import keeps_states
from kakeya_vllm.progress import write_atomically
from kakeya_vllm.seed import recipe as seed_recipe
from kakeya_vllm.support import windowed_layers
from kakeya_vllm.text import consecutive_passages, detokenise, read_text, sha256_of, tokenise

# Passages that an evaluation begins with when it chooses by itself how many it needs.
FIRST_PASSAGES = 24
# vLLM's kv_cache_dtype values that are another format of the cache.
STOCK_FORMATS = ("fp8", "fp8_e4m3", "fp8_e5m2", "int4_per_token_head", "int8_per_token_head")
# After figures of simulated caches, which vLLM allocated nothing for.
STORED = "*"
STORED_NOTE = f"{STORED} bytes that would be stored, counted on the coded prefix; not allocated"
# Variables that change figures; others hold paths of this machine.
RECORDED_VARIABLES = {
    "KAKEYA_BOUNDARY_SKIP_LAYERS",
    "KAKEYA_PREFILL",
    "KAKEYA_RECIPE",
    "VLLM_CPU_KVCACHE_SPACE",
}


def is_stock(name: str) -> bool:
    return name in STOCK_FORMATS or name.startswith("turboquant_")


def plan_caches(
    names: list[str | None],
    mode: str,
    streams: str,
    layers: tuple[int, ...] | None,
    boundaries: list[int],
    coded_tokens: int,
    num_layers: int,
) -> list[Cache]:
    """What has to run for the wishes of a command line; raises SystemExit for what cannot be."""
    native = mode in ("snapshot", "generate") and streams == "kv"
    if mode == "generate" and not native:
        raise SystemExit("kakeya: mode generate runs the backend: both streams")
    caches = []
    for name in names:
        if name is not None and is_stock(name):
            if not native or layers is not None or any(boundaries):
                raise SystemExit(
                    f"kakeya: {name} is vLLM's own cache: simulated modes, streams, layers and "
                    "boundaries are for recipes of KAKEYA"
                )
            caches.append(Cache(name, "stock", name))
            continue
        seed = _seed_recipe(name)
        served = os.environ.get("KAKEYA_RECIPE")
        if name is None and _seed_recipe(served) is not None:
            raise SystemExit(
                f"kakeya: KAKEYA_RECIPE={served} is one of the seed's, which this command "
                "simulates: name it with --caches (its form in pages with -served behind it)"
            )
        if seed is not None and mode == "generate":
            raise SystemExit(
                f"kakeya: {name} is simulated; mode generate and --task are for caches that serve"
            )
        for boundary in boundaries:
            chosen = set(range(num_layers) if layers is None else layers)
            chosen -= set(range(boundary)) | set(range(num_layers - boundary, num_layers))
            if not chosen or max(chosen) >= num_layers:
                raise SystemExit(
                    f"kakeya: no layers are left to compress of {num_layers} (layers {layers}, "
                    f"boundary {boundary}); valid are layers 0 to {num_layers - 1}"
                )
            whole = len(chosen) == num_layers
            parts = [name or "kakeya"]
            parts += [mode] if mode not in ("snapshot", "generate") else []
            parts += [f"{streams} only"] if streams != "kv" else []
            if boundary:
                parts.append(f"boundary {boundary}")
            if layers is not None:
                parts.append("layers " + " ".join(map(str, layers)))
            caches.append(
                Cache(
                    ", ".join(parts) if mode != "identity" else "identity",
                    "kakeya" if native and seed is None else "simulated",
                    name,
                    mode,
                    streams,
                    None if whole else tuple(sorted(chosen)),
                    coded_tokens if mode == "prefix-only" else engine.CHUNK,
                )
            )
    return caches


def _seed_recipe(name: str | None) -> seed_recipe.SeedRecipe | None:
    try:
        return seed_recipe.find(name)
    except seed_recipe.RecipeError as error:
        raise SystemExit(f"kakeya: {error}") from None


def environment_of(cache: Cache, num_layers: int) -> dict[str, str]:
    """Variables of the engine of a cache."""
    found = {}
    if cache.kind == "kakeya":
        if cache.name:
            found["KAKEYA_RECIPE"] = cache.name
        if cache.layers is not None:
            kept = sorted(set(range(num_layers)) - set(cache.layers))
            found["KAKEYA_BOUNDARY_SKIP_LAYERS"] = ",".join(map(str, kept))
    return found


def evaluate(
    model: str,
    text_path: str,
    passages: int | None = None,
    names: list[str | None] | None = None,
    *,
    dtype: str = "bfloat16",
    mode: str = "snapshot",
    streams: str = "kv",
    layers: tuple[int, ...] | None = None,
    boundaries: list[int] | None = None,
    coded_tokens: int = engine.CHUNK,
) -> dict[str, Any]:
    """Compare caches with the stock cache on the first passages of a text.

    ``passages`` None: as many as decide (metrics.is_resolved), if the text has them. ``names``:
    recipes (None: what KAKEYA_RECIPE or the plugin chooses) and vLLM's own formats. ``dtype`` is
    that of the model in all engines: with float32 the noise of bf16 arithmetic, which differs
    between two attention implementations, is gone. Returns a dictionary ready for JSON, see
    docs/quality.md.
    """
    refuse_mixed(model)
    num_layers = layers_of(model)
    caches = plan_caches(
        names or [None], mode, streams, layers, boundaries or [0], coded_tokens, num_layers
    )
    tokens = tokenise(model, read_text(text_path))
    available = len(tokens) // protocol.PASSAGE
    wanted = passages or min(FIRST_PASSAGES, available)
    chosen = consecutive_passages(tokens, protocol.PASSAGE, passages or max(available, 1))
    reference = Cache(protocol.REFERENCE, "stock", protocol.REFERENCE)
    figures: list[list[TokenFigures]] = [[] for _ in caches]
    about: list[dict[str, Any]] = [{} for _ in caches]
    alive, failed = list(range(len(caches))), []
    done, first = 0, None
    while True:
        part = chosen[done:wanted]
        with tempfile.TemporaryDirectory(prefix="kakeya-eval-") as directory:
            rows = str(Path(directory, "reference.npy"))
            spec = {"model": model, "passages": part, "dtype": dtype, "reference": rows}
            present = [reference, *(caches[i] for i in alive)]
            ran = _run_part(spec, present, num_layers, directory)
        first = first or ran[0][0]
        for i, one in zip(tuple(alive), ran[1:], strict=True):
            if one is None:
                alive.remove(i)
                failed.append(caches[i].label)
            else:
                about[i] = about[i] or one[0]
                figures[i].append(one[1])
        if not alive:
            raise SystemExit("kakeya: every engine failed; what they said is above")
        done = wanted
        joined = [TokenFigures.joined(figures[i]) for i in alive]
        qualities = [found.quality() for found in joined]
        unresolved = [q for q in qualities if not metrics.is_resolved(q)]
        if passages or not unresolved or done == available:
            break
        # At least half as many again: an interval is itself uncertain.
        needed = max(map(metrics.passages_needed, unresolved))
        wanted = min(available, max(needed, done + done // 2))
        print(f"kakeya: {done} passages do not decide; {wanted} will be taken", flush=True)
    runs = [
        {
            "label": _label(caches[i], about[i]),
            "kind": caches[i].kind,
            "ratio": _ratio(first, about[i]),
            **about[i],
            "verdict": metrics.verdict(quality),
            "quality": quality,
            "per_passage": found.per_passage(),
            "kl_by_position": found.kl_by_position(),
        }
        for i, quality, found in zip(alive, qualities, joined, strict=True)
    ]
    return {
        "settings": settings_of(model, text_path, mode, streams, dtype)
        | {
            "passages": done,
            "prefix_tokens": engine.CHUNK,
            "scored_tokens": protocol.SCORED,
            "logits": "float32",
        },
        "versions": versions(),
        "reference": {
            "label": dtype.replace("bfloat16", "bf16"),
            "ppl": qualities[0]["ppl_reference"],
            **first,
        },
        "runs": runs,
        "failed": failed,
    }


def _run_part(
    spec: dict[str, Any], caches: list[Cache], num_layers: int, directory: str
) -> list[tuple[dict[str, Any], TokenFigures | None] | None]:
    """What there is to say of each cache's engine, and its figures (None of the reference, which
    comes first). One process for every engine. None for caches whose engine failed; without the
    reference nothing can be said, and its failure ends all."""
    outs = [str(Path(directory, f"figures-{i}.npz")) for i in range(len(caches))]
    found: dict[int, tuple[dict[str, Any], TokenFigures | None] | None] = {}
    for group in protocol.engine_groups(caches):
        members = [caches[i] for i in group]
        files = [outs[i] for i in group]
        environment = environment_of(members[0], num_layers)
        try:
            answers = protocol.in_child(spec | {"caches": members, "figures": files}, environment)
        except SystemExit as error:
            if 0 in group:
                raise
            # What the others gave must not be lost to one that, say, this machine cannot run.
            print(f"{error}; it is left out", file=sys.stderr, flush=True)
            found |= dict.fromkeys(group)
            continue
        for i, answer in zip(group, answers, strict=True):
            figures = None
            if Path(outs[i]).exists():
                with np.load(outs[i]) as saved:
                    figures = TokenFigures(**saved)
            found[i] = answer, figures
    return [found[i] for i in range(len(caches))]


def refuse_mixed(model: str) -> None:
    """SystemExit for a model that mixes kinds of layers: layers are numbered by what is coded here,
    and bytes a token are those of full attention."""
    text = _text_config(model)
    if windowed_layers(text):
        kind = "mixes full and sliding-window layers"
    elif keeps_states(text):
        kind = "is a hybrid model"
    else:
        return
    raise SystemExit(
        f"kakeya: {model} {kind}, which this evaluation does not measure; --task asks such a model "
        "questions"
    )


def layers_of(model: str) -> int:
    return _text_config(model).num_hidden_layers


def _text_config(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()


def settings_of(model: str, text_path: str, mode: str, streams: str, dtype: str) -> dict[str, Any]:
    """What a result was asked for."""
    return {
        "model": Path(model).name,
        "text": Path(text_path).name,
        "text_sha256": sha256_of(text_path),
        "mode": mode,
        "streams": streams,
        "dtype": dtype,
        "command": shlex.join(["kakeya", *sys.argv[1:]]),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in RECORDED_VARIABLES},
    }


def _label(cache: Cache, ran: dict[str, Any]) -> str:
    """A cache whose recipe was left to the plugin is called by the recipe that it took."""
    if cache.name is None and ran["codec"]:
        return cache.label.replace("kakeya", ran["codec"]["name"], 1)
    return cache.label


def _ratio(reference: dict[str, Any], ran: dict[str, Any]) -> float | None:
    """Tokens of capacity in the same bytes: as vLLM allocated both or, of a simulated cache, as its
    codes would be stored; None where neither is known."""
    if ran["stored"]:
        return ran["stored"]["ratio"]
    if not ran["cache"]:
        return None
    return reference["cache"]["bytes_per_token"] / ran["cache"]["bytes_per_token"]


def versions() -> dict[str, str]:
    """What produced a figure."""
    from importlib.metadata import version

    return {
        "kakeya": __version__,
        "vllm": version("vllm"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _allocated(run: dict[str, Any]) -> tuple[str, str]:
    """Bytes of cache a token, and tokens of capacity in so many bytes."""
    cache = run["cache"]
    if run.get("stored"):
        return f"{run['stored']['bytes_per_token']:,.0f}{STORED}", ""
    if not cache:
        return "", ""
    size = cache["kv_cache_bytes"] / 2**30
    return f"{cache['bytes_per_token']:,.0f}", f"{cache['capacity_tokens']:,} in {size:.2f} GiB"


def report(result: dict[str, Any]) -> str:
    """The figures as a table for people."""
    head = (
        "cache",
        "bytes/token",
        "capacity",
        "ratio",
        "delta ppl",
        "top-1",
        "mean KL, nats",
        "verdict",
    )
    reference = result["reference"]
    rows = [head, (reference["label"], *_allocated(reference), *[""] * 5)]
    for run in result["runs"]:
        q = run["quality"]
        low, high = q["delta_ppl_95"]
        bottom, top = q["top1_95"]
        small, large = q["kl_mean_95"]
        rows.append(
            (
                run["label"],
                *_allocated(run),
                f"{run['ratio']:.2f}x{STORED if run.get('stored') else ''}" if run["ratio"] else "",
                f"{q['delta_ppl']:+.2%} [{low:+.2%}, {high:+.2%}]",
                f"{q['top1']:.1%} [{bottom:.1%}, {top:.1%}]",
                f"{q['kl_mean']:.4f} [{small:.4f}, {large:.4f}]",
                run["verdict"],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    table = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    settings = result["settings"]
    count = settings["passages"]
    open_blocks = [
        f"{run['label']}: open blocks take {run['open_blocks_bytes'] / 2**20:.1f} MiB beside it"
        for run in result["runs"]
        if run.get("open_blocks_bytes")
    ]
    return "\n".join(
        [
            f"{settings['model']}, {settings['text']}, {count} passages of "
            f"{settings['prefix_tokens']} + {settings['scored_tokens']} tokens, mode "
            f"{settings['mode']}, streams {settings['streams']}; perplexity of the reference "
            f"{reference['ppl']:.3f}; 95 % intervals",
            "",
            *(line.rstrip() for line in table),
            "",
            *open_blocks,
            *([STORED_NOTE] if any(run.get("stored") for run in result["runs"]) else []),
        ]
    ).rstrip()


def write_json(path: str | Path, value: Any) -> None:
    write_atomically(Path(path), (json.dumps(value, indent=1) + "\n").encode("utf-8"))


def answering_caches(args: argparse.Namespace) -> list[tuple[Cache, dict[str, str]]]:
    """The caches of a command line that write answers, and the variables of each one's engine."""
    num_layers = layers_of(args.model)
    caches = plan_caches(
        args.caches or [None],
        "generate",
        args.streams,
        args.layers,
        args.boundary,
        args.coded_tokens,
        num_layers,
    )
    return [(cache, environment_of(cache, num_layers)) for cache in caches]


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Mode generate: long greedy answers instead of teacher-forced predictions."""
    planned = answering_caches(args)
    tokens = tokenise(args.model, read_text(text_of(args)))
    chosen = consecutive_passages(tokens, protocol.PASSAGE, args.passages or FIRST_PASSAGES)
    runs = generation.evaluate(args.model, chosen, planned, args.max_tokens, args.dtype)
    print(generation.report(runs, args.max_tokens))
    return {
        "settings": settings_of(args.model, args.text, args.mode, args.streams, args.dtype)
        | {"prompt_tokens": generation.PROMPT_TOKENS, "max_tokens": args.max_tokens},
        "versions": versions(),
        "runs": runs,
    }


def task_of(args: argparse.Namespace) -> tasks.Task:
    """The questions of `--task`."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.task == "gsm8k":
        if not args.data:
            raise SystemExit("kakeya: --task gsm8k needs --data, a file of questions and answers")
        return tasks.gsm8k_prompts(tokenizer, tasks.load_gsm8k(args.data), count=args.limit)
    window = AutoConfig.from_pretrained(args.model).get_text_config().max_position_embeddings
    return tasks.needle_prompts(
        tokenizer,
        detokenise(read_text(text_of(args))),
        args.lengths,
        args.depths,
        seed=0,
        max_model_len=window,
    )


def ask(args: argparse.Namespace) -> dict[str, Any]:
    """`kakeya eval --task`: questions with answers, by the stock cache and by others."""
    task = task_of(args)
    planned = answering_caches(args)
    spec = {
        "model": args.model,
        "prompts": task.prompts,
        "max_tokens": task.max_tokens,
        "stop": list(task.stop),
        "dtype": args.dtype,
    }

    def answers(cache: Cache, environment: dict[str, str]) -> dict[str, Any]:
        return protocol.in_child(spec | {"cache": cache}, environment, generation.__name__)

    reference = answers(Cache(protocol.REFERENCE, "stock", protocol.REFERENCE), {})
    runs = []
    for cache, environment in planned:
        found = answers(cache, environment)
        figures = tasks.compare_task(
            reference["texts"], found["texts"], task.expected, task.right, task.groups
        )
        runs.append({"task": task.name, "label": cache.label, "kind": cache.kind, **figures})
        print(tasks.report_task(runs[-1]), end="\n\n")
    return {
        "settings": {"model": Path(args.model).name, "task": task.name, "dtype": args.dtype}
        | {"command": shlex.join(["kakeya", *sys.argv[1:]])},
        "versions": versions(),
        "runs": runs,
    }


def text_of(args: argparse.Namespace) -> str:
    if not args.text:
        raise SystemExit("kakeya: --text is needed, a UTF-8 text to evaluate on")
    return args.text


def evaluate_command(args: argparse.Namespace) -> None:
    """`kakeya eval`."""
    for path in filter(None, (args.json, args.html)):
        # An hour of figures must not be lost to a path that cannot be written.
        if not Path(path).resolve().parent.is_dir():
            raise SystemExit(f"kakeya: the directory of {path} does not exist")
    if args.task or args.mode == "generate":
        if args.html:
            raise SystemExit(
                "kakeya: the HTML report is of perplexity modes; --json has these figures"
            )
        result = ask(args) if args.task else generate(args)
        if args.json:
            write_json(args.json, result)
        return
    result = evaluate(
        args.model,
        text_of(args),
        args.passages,
        args.caches,
        dtype=args.dtype,
        mode=args.mode,
        streams=args.streams,
        layers=args.layers,
        boundaries=args.boundary,
        coded_tokens=args.coded_tokens,
    )
    print(report(result))
    if args.json:
        write_json(args.json, result)
    if args.html:
        from kakeya_vllm.evaluation.html import render

        write_atomically(Path(args.html), render(result).encode("utf-8"))
    if result["failed"]:
        raise SystemExit(f"kakeya: left out, their engines failed: {'; '.join(result['failed'])}")
