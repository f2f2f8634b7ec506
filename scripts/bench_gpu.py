"""Engine benchmark on a GPU: Qwen3-4B shapes with dummy weights, one process an engine.

    python scripts/bench_gpu.py                         # the tables of docs/benchmarks.md
    python scripts/bench_gpu.py --cells 64x8192,1x8192 --caches bf16,kakeya-4.6x

For each cache, with full CUDA graphs for decoding and no torch.compile:

- time to the first token of one prompt of 8,192 and of 32,768 tokens, and tokens a second of
  prefilling eight prompts of 8,192: medians of runs with prompts of their own;
- for each cell (batch x context): prompts of that length are prefilled, then all sequences decode;
  milliseconds a token are the median of the steps in which all do;
- tokens of capacity.

The caches: bf16, fp8, or a recipe; a recipe that needs calibration gets a synthetic artefact.
Weights are random, so the text means nothing; times and sizes are those of the shapes. Ratios are
against bf16, above 1 is better; what loses is bold (prefill and first tokens: by more than 5 %).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_common as common
from kakeya_vllm.bench import PREFILL_BOUND, RESULT, STEP_TOKENS, Steps, growth, results_of

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# The last one does not fit in bf16.
CELLS = "1x8192,64x8192,256x8192"
CACHES = "bf16,fp8,kakeya-4.6x,kakeya-4.6x-trellis"
FIRST_TOKEN = "8192,32768"
PREFILL = (8, 8192)  # prompts, tokens of each


def engine(model: str, cache: str, arguments: argparse.Namespace) -> Any:
    """One engine with one cache, large enough for all that is measured."""
    from vllm import LLM

    cells = common.cells(arguments.cells)
    longest = [context + growth(batch, context, arguments.steps) for batch, context in cells]
    longest += [length + 16 for length in first_tokens(arguments)]
    batches = sorted({1, 2, *(batch for batch, _ in cells)})
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(longest),
        "max_num_seqs": max(*batches, PREFILL[0]),
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.9,
        "seed": 0,
        "disable_log_stats": True,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": batches,
        },
    }
    if cache == "fp8":
        settings["kv_cache_dtype"] = "fp8"
    elif cache != "bf16":
        settings["attention_backend"] = "KAKEYA"
        chosen = {"recipe": cache, "calibration": artefact(model, cache)}
        settings["additional_config"] = {"kakeya": chosen}
    return LLM(model, **(settings | json.loads(arguments.options)))


def artefact(model: str, recipe: str) -> str:
    """Path of a synthetic artefact for the model, "" for a recipe that needs none."""
    from kakeya_vllm.config import model_fingerprint

    if not common.needs_calibration(recipe):
        return ""
    path = Path(model) / "calibration.safetensors"
    shape = (QWEN3_4B[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    path.write_bytes(common.Statistics(*shape).artefact(model_fingerprint(QWEN3_4B)))
    return str(path)


def child(arguments: argparse.Namespace) -> None:
    """Measure one cache; every result is a line, so that those before a failure count."""

    def result(name: str, values: dict[str, Any]) -> None:
        print(RESULT + json.dumps({"name": name, **values}), flush=True)

    began = time.perf_counter()
    llm = engine(arguments.model, arguments.child, arguments)
    cache = llm.llm_engine.vllm_config.cache_config
    capacity = cache.num_gpu_blocks * cache.block_size
    start_s = round(time.perf_counter() - began, 1)
    result("engine", {"capacity": capacity, "start_s": start_s})
    steps = Steps(llm)
    steps.decode(2, 256, 8)  # compiles what is compiled at first use
    for length in first_tokens(arguments):
        steps.prefill_s(1, length)
        times = [steps.prefill_s(1, length) for _ in range(arguments.repeats)]
        result(f"first token, {length:,}", {"ms": round(1e3 * statistics.median(times), 1)})
    if not arguments.no_prefill:
        count, length = PREFILL
        times = [steps.prefill_s(count, length) for _ in range(arguments.repeats)]
        result("prefill", {"tokens_a_s": round(count * length / statistics.median(times))})
    for batch, context in common.cells(arguments.cells):
        blocks = -(-(context + growth(batch, context, arguments.steps)) // cache.block_size)
        if batch * blocks * cache.block_size > capacity:
            result(f"{batch}x{context}", {"does_not_fit": True})
        else:
            result(f"{batch}x{context}", steps.decode(batch, context, arguments.steps))


def first_tokens(arguments: argparse.Namespace) -> list[int]:
    return [int(length) for length in arguments.first_token.split(",") if length]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default=CELLS, help="batch x context, with commas")
    parser.add_argument("--caches", default=CACHES, help="bf16, fp8, names of recipes")
    parser.add_argument("--steps", type=int, default=64, help="steps of decoding that are timed")
    parser.add_argument(
        "--first-token", default=FIRST_TOKEN, help='lengths of prompts, with commas; "": none'
    )
    parser.add_argument("--no-prefill", action="store_true", help="leave out its throughput")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a prompt length")
    parser.add_argument("--options", default="{}", help="more options of vllm.LLM, JSON")
    parser.add_argument("--timeout", type=float, default=600, help="seconds an engine may take")
    parser.add_argument("--out", help="also write the results here, JSON")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    common.cells(arguments.cells)
    if arguments.child:
        child(arguments)
        return
    results: dict[str, Any] = {"environment": common.environment(), "caches": {}}
    print(json.dumps(results["environment"], indent=1), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(QWEN3_4B))
        for cache in arguments.caches.split(","):
            results["caches"][cache] = run(directory, cache, arguments)
            if arguments.out:
                Path(arguments.out).write_text(json.dumps(results, indent=1))
    print(report(results["caches"]))
    if any("failed" in found for found in results["caches"].values()):
        sys.exit(1)


def run(directory: str, cache: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one cache in a process of its own: engines do not give all memory back."""
    command = [sys.executable, __file__, "--child", cache, "--model", directory]
    command += ["--cells", arguments.cells, "--options", arguments.options]
    command += ["--steps", str(arguments.steps), "--repeats", str(arguments.repeats)]
    command += [f"--first-token={arguments.first_token}"]
    if arguments.no_prefill:
        command.append("--no-prefill")
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    found: dict[str, Any] = {}

    def take(text: str) -> None:
        result = json.loads(text)
        found[result.pop("name")] = result
        print(f"{cache:24} {text.strip()}", flush=True)

    failed = results_of(command, environment, arguments.timeout, take)
    if failed is not None:
        found["failed"] = failed["why"]
        print(f"{cache}: {failed['why']}\n{failed['output']}", flush=True)
    return found


def report(results: dict[str, dict[str, Any]]) -> str:
    """A row a cache, a column a measurement, ratios to bf16."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    names = [name for name in names if name != "failed"]
    titles = {"engine": "capacity, tokens", "prefill": "prefill, tokens/s"}
    header = [titles.get(name, f"{name}, ms") for name in names]
    rows = [
        [cache, *(entry(name, found, results.get("bf16", {}), cache == "bf16") for name in names)]
        for cache, found in results.items()
    ]
    return "\n" + common.table(["cache", *header], rows)


def entry(name: str, found: dict[str, Any], base: dict[str, Any], is_base: bool) -> str:
    """One measurement, with how many times as good as the base's it is."""
    result, other = found.get(name), base.get(name, {})
    if result is None:
        return "failed" if "failed" in found else ""
    if "does_not_fit" in result:
        return "does not fit"
    (key,) = {"capacity", "tokens_a_s", "ms", "ms_a_token"} & set(result)
    text = f"{result[key]:,}"
    if is_base or key not in other:
        return text
    better = result[key] / other[key] if key in ("capacity", "tokens_a_s") else None
    better = other[key] / result[key] if better is None else better
    least = 1.0 if key in ("capacity", "ms_a_token") else PREFILL_BOUND
    return f"{text} ({common.ratio(better, least)})"


if __name__ == "__main__":
    main()
