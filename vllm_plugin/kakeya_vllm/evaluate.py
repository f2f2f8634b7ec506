"""Evaluation: how far the answers move when the cache is compressed.

Snapshot protocol, in vLLM itself. A passage is 2,113 consecutive tokens of the text. Its first
2,048 are prefilled as one clean chunk: they attend to each other uncompressed, and their keys and
values fill 16 blocks. The remaining 65 are the next step; its tokens read the cache and, in it,
every earlier token. Their logits predict tokens 2,049 to 2,112: 64 teacher-forced predictions a
passage, each of them through the compressed cache. The same passages run through vLLM's stock
attention with its bf16 cache, and the two are compared token by token:

    delta_ppl   exp(mean nll - mean nll of the reference) - 1
    top1        share of predictions whose most likely token is the reference's
    kl          KL(reference || compressed) over the whole vocabulary, in nats

Intervals are 95 % bootstrap intervals over passages: tokens of a passage are not independent.

Each configuration runs in a process of its own, so that no state is shared. The output layer is
evaluated in float32 for both (vLLM's `head_dtype`): bf16 logits of a size around 20 are multiples
of 1/8, which alone would flip 1 % of the top tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kakeya_vllm import __version__, engine
from kakeya_vllm.text import consecutive_passages, read_text, sha256_of, tokenise

SCORED = 64
# The last scored token is predicted by the token before it, hence one more.
PASSAGE = engine.CHUNK + SCORED + 1
BOOTSTRAP_SAMPLES = 10_000
KAKEYA_BACKEND = "KAKEYA"
# Variables that change figures; others hold paths of this machine.
RECORDED_VARIABLES = {
    "KAKEYA_BOUNDARY_SKIP_LAYERS",
    "KAKEYA_PREFILL",
    "KAKEYA_RECIPE",
    "VLLM_CPU_KVCACHE_SPACE",
}


class Steps:
    """Forward hook on the model: what every step was made of, and the hidden states of the last."""

    def __init__(self, model):
        self.model = model
        self.spans: list[tuple[int, int, int]] = []
        self.hidden = None
        model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, _module, args, kwargs, output):
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        self.spans.append((int(positions[0]), int(positions[-1]), positions.shape[0]))
        self.hidden = output

    def log_probabilities(self, llm, passage: list[int]) -> np.ndarray:
        """Float32 [SCORED, vocabulary]: log-probabilities of tokens CHUNK + 1 .. CHUNK + SCORED."""
        import torch

        self.spans.clear()
        engine.run_prompt(llm, passage)
        rest = SCORED + 1
        expected = [(0, engine.CHUNK - 1, engine.CHUNK), (engine.CHUNK, PASSAGE - 1, rest)]
        if self.spans != expected:
            raise RuntimeError(
                f"the engine ran steps (first position, last position, tokens) {self.spans}; the "
                f"protocol needs {expected}"
            )
        with torch.inference_mode():
            logits = self.model.compute_logits(self.hidden[:SCORED])
            return logits.float().log_softmax(-1).cpu().numpy()


def run_configuration(
    model: str, passages: list[list[int]], backend: str | None, dtype: str, out: str
) -> dict[str, Any]:
    """Log-probabilities of all passages into the .npy file `out`; returns figures of the engine."""
    from tqdm import tqdm

    started = time.monotonic()
    overrides = {"head_dtype": "float32"}
    llm = engine.in_process_engine(model, backend, dtype=dtype, hf_overrides=overrides)
    steps = engine.on_model(llm, Steps)
    loaded = time.monotonic()
    label = backend.lower() if backend else "reference"
    rows = None
    for i, passage in enumerate(tqdm(passages, desc=f"evaluating {label}", unit="passage")):
        values = steps.log_probabilities(llm, passage)
        if rows is None:
            shape = (len(passages), *values.shape)
            rows = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
        rows[i] = values
    rows.flush()
    return {
        "cache": engine.cache_figures(llm),
        "codec": codec_figures(llm) if backend == KAKEYA_BACKEND else None,
        "dtype": str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
        "load_seconds": loaded - started,
        "run_seconds": time.monotonic() - loaded,
    }


def codec_figures(llm) -> dict[str, Any]:
    """Which recipe and tables a KAKEYA engine ran with."""
    (runtime,) = llm.collective_rpc(lambda worker: worker._kakeya)
    about = runtime.codec.describe() if runtime.codec else {}
    return {
        **{name: about.get(name) for name in ("name", "ratio", "quantizer", "fingerprint")},
        "calibrated": runtime.settings.calibration is not None,
        "prefill": runtime.settings.prefill,
        "compressed_layers": len(runtime.layers),
        "boundary_skip_layers": list(runtime.settings.boundary_skip_layers),
    }


def run_in_child(spec: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """`run_configuration(**spec)` in a fresh interpreter; its standard error (progress) is ours."""
    with tempfile.TemporaryDirectory(prefix="kakeya-eval-") as directory:
        request, answer = Path(directory, "request.json"), Path(directory, "answer.json")
        request.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "kakeya_vllm.evaluate", str(request), str(answer)]
        done = subprocess.run(command, env=os.environ | environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            name = spec["backend"] or "the reference"
            raise SystemExit(f"kakeya: the engine for {name} failed (exit {done.returncode})")
        return json.loads(answer.read_text())


def interval(values: np.ndarray, statistic) -> list[float]:
    """[low, high]: 95 % bootstrap interval of `statistic(passages)` over the rows of `values`."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))
    samples = np.sort([statistic(values[p]) for p in picks])
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def compare(reference, alternative, targets: np.ndarray) -> dict[str, Any]:
    """Figures of `alternative` against `reference`.

    Both: float32 log-probabilities [passages, SCORED, vocabulary]; targets: int [passages, SCORED].
    Passages are read one at a time, so both may be memory maps larger than memory.
    """
    if reference.shape != alternative.shape or reference.shape[:2] != targets.shape:
        raise ValueError(
            f"shapes differ: {reference.shape}, {alternative.shape}, targets {targets.shape}"
        )
    nll_ref, nll_alt, agree, kl = (np.empty(targets.shape) for _ in range(4))
    for p in range(len(targets)):
        ref, alt = (np.asarray(x[p], dtype=np.float64) for x in (reference, alternative))
        rows = np.arange(targets.shape[1])
        nll_ref[p], nll_alt[p] = -ref[rows, targets[p]], -alt[rows, targets[p]]
        agree[p] = ref.argmax(-1) == alt.argmax(-1)
        kl[p] = (np.exp(ref) * (ref - alt)).sum(-1)

    def delta(difference):
        return float(np.expm1(difference.mean()))

    return {
        "passages": int(targets.shape[0]),
        "predictions": int(targets.size),
        "ppl_reference": float(np.exp(nll_ref.mean())),
        "ppl": float(np.exp(nll_alt.mean())),
        "delta_ppl": delta(nll_alt - nll_ref),
        "delta_ppl_95": interval((nll_alt - nll_ref).mean(1), delta),
        "top1": float(agree.mean()),
        "top1_95": interval(agree.mean(1), np.mean),
        "kl_mean": float(kl.mean()),
        "kl_mean_95": interval(kl.mean(1), np.mean),
        "kl_median": float(np.median(kl)),
        "kl_99.9": float(np.quantile(kl, 0.999)),
    }


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


def evaluate(
    model: str, text_path: str, passages: int, recipe: str | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Compare KAKEYA with the stock cache on the first `passages` passages of a text.

    Returns a dictionary ready for JSON: `quality` (see `compare`), `reference` and `kakeya` (what
    each engine allocated and took), `capacity_ratio`, `settings`, `versions`. `recipe` None leaves
    the choice to KAKEYA_RECIPE and the plugin. `dtype` is that of the model in both engines: with
    float32 the noise of bf16 arithmetic, which differs between two attention implementations, is
    gone and what remains is the codec.
    """
    tokens = tokenise(model, read_text(text_path))
    chosen = consecutive_passages(tokens, PASSAGE, passages)
    targets = np.array([p[engine.CHUNK + 1 :] for p in chosen])
    environment = {"KAKEYA_RECIPE": recipe} if recipe else {}
    with tempfile.TemporaryDirectory(prefix="kakeya-eval-") as directory:
        runs, rows = {}, {}
        for name, backend in (("reference", None), ("kakeya", KAKEYA_BACKEND)):
            out = str(Path(directory, f"{name}.npy"))
            spec = {"model": model, "passages": chosen, "backend": backend, "out": out}
            spec["dtype"] = dtype
            runs[name] = run_in_child(spec, environment)
            rows[name] = np.load(out, mmap_mode="r")
        quality = compare(rows["reference"], rows["kakeya"], targets)
        del rows
    return {
        "quality": quality,
        "capacity_ratio": runs["kakeya"]["cache"]["capacity_tokens"]
        / runs["reference"]["cache"]["capacity_tokens"],
        **runs,
        "settings": {
            "model": Path(model).name,
            "text": Path(text_path).name,
            "text_sha256": sha256_of(text_path),
            "passages": passages,
            "prefix_tokens": engine.CHUNK,
            "scored_tokens": SCORED,
            "logits": "float32",
            "environment": {
                k: v
                for k, v in sorted((os.environ | environment).items())
                if k in RECORDED_VARIABLES
            },
        },
        "versions": versions(),
    }


def report(result: dict[str, Any]) -> str:
    """The figures as a table for people."""
    q = result["quality"]
    ref, alt = result["reference"]["cache"], result["kakeya"]["cache"]

    def percent(name, digits=2, sign="+"):
        low, high = q[f"{name}_95"]
        return f"{q[name]:{sign}.{digits}%}  [{low:{sign}.{digits}%}, {high:{sign}.{digits}%}]"

    low, high = q["kl_mean_95"]
    dtype = result["reference"]["dtype"].replace("bfloat16", "bf16")
    kv_bytes = alt["kv_cache_bytes"] / 2**30
    lines = [
        ("", dtype, "KAKEYA", "ratio"),
        (
            "KV bytes per token",
            f"{ref['bytes_per_token']:,.1f}",
            f"{alt['bytes_per_token']:,.1f}",
            f"{ref['bytes_per_token'] / alt['bytes_per_token']:.2f}x",
        ),
        (
            f"tokens of capacity in {kv_bytes:.2f} GiB",
            f"{ref['capacity_tokens']:,}",
            f"{alt['capacity_tokens']:,}",
            f"{result['capacity_ratio']:.2f}x",
        ),
    ]
    table = [f"{a:<34}{b:>14}{c:>14}{d:>9}" for a, b, c, d in lines]
    codec = result["kakeya"]["codec"]
    count = f"{q['passages']} passages, {q['predictions']} predictions"
    figures = [
        ("perplexity", f"{q['ppl_reference']:.3f} -> {q['ppl']:.3f}"),
        ("delta ppl", percent("delta_ppl")),
        ("top-1 agreement", percent("top1", 1, "")),
        ("mean KL, nats", f"{q['kl_mean']:.5f}  [{low:.5f}, {high:.5f}]"),
        ("median / 99.9 % KL", f"{q['kl_median']:.5f} / {q['kl_99.9']:.5f}"),
    ]
    quality = [f"{name:<34}{value}" for name, value in figures]
    source = "calibrated" if codec["calibrated"] else "calibration-free"
    title = f"recipe {codec['name']} ({source}) against {dtype} on {count}; 95 % intervals"
    return "\n".join([*table, "", title, *quality])


def write_json(path: str | Path, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def evaluate_command(args: argparse.Namespace) -> None:
    """`kakeya eval`."""
    result = evaluate(args.model, args.text, args.passages, args.recipe, args.dtype)
    print(report(result))
    if args.json:
        write_json(args.json, result)


def child(argv: list[str]) -> int:
    """Entry of the processes that `run_in_child` starts."""
    request, answer = argv
    engine.prepare_environment()
    spec = json.loads(Path(request).read_text())
    write_json(answer, run_configuration(**spec))
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1:]))
