"""Engine benchmark on a GPU: Qwen3-4B shapes with dummy weights, one process an engine.

    python scripts/bench_gpu.py                         # the table of docs/benchmarks.md
    python scripts/bench_gpu.py --cells 64x8192,1x8192 --caches bf16,kakeya-4.6x

For each cache and each cell (batch x context): prompts of the context's length are prefilled, then
every sequence decodes 128 tokens. Printed: milliseconds a token (median of the last steps, all
sequences decoding), seconds to prefill, tokens of capacity. The caches: bf16, fp8, or a recipe.
Weights are random, so the text means nothing; times and sizes are those of the shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
CELLS = "64x8192,1x8192,1x32768,256x2048"
CACHES = "bf16,fp8,kakeya-free-4.6x,kakeya-free-4.6x-uniform"
DECODED = 128


def engine(model: str, cache: str, cells: list[tuple[int, int]], options: dict[str, Any]) -> Any:
    """One engine with one cache, large enough for all cells."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(context for _, context in cells) + DECODED + 8,
        "max_num_seqs": max(batch for batch, _ in cells),
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.9,
        "seed": 0,
        "disable_log_stats": True,
    }
    if cache == "fp8":
        settings["kv_cache_dtype"] = "fp8"
    elif cache != "bf16":
        settings["attention_backend"] = "KAKEYA"
        settings["additional_config"] = {"kakeya": {"recipe": cache, "calibration": ""}}
    return LLM(model, **(settings | options))


def measure(llm: Any, batch: int, context: int) -> dict[str, float]:
    """Prefill `batch` prompts of `context` tokens, then decode; steps of the engine are timed."""
    from vllm import SamplingParams

    inner = llm.llm_engine
    parameters = SamplingParams(
        temperature=0, max_tokens=DECODED, ignore_eos=True, detokenize=False
    )
    start = time.perf_counter()
    for i in range(batch):
        # Different prompts, any tokens: no prefix is shared.
        tokens = [(7 * i + 13 * j + j // 97) % 150000 for j in range(context)]
        inner.add_request(f"{batch}x{context}-{i}", {"prompt_token_ids": tokens}, parameters)
    counts: dict[str, int] = {}
    times = [time.perf_counter()]
    totals = [0]
    while inner.has_unfinished_requests():
        for output in inner.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        times.append(time.perf_counter())
        totals.append(sum(counts.values()))
    steps = [
        1e3 * (b - a)
        for a, b, x, y in zip(times, times[1:], totals, totals[1:], strict=False)
        if y - x == batch
    ]
    first = next(t for t, total in zip(times, totals, strict=True) if total >= batch)
    return {
        "ms_a_token": round(statistics.median(steps[len(steps) // 4 :]), 3) if steps else 0.0,
        "steps": len(steps),
        "prefill_s": round(first - start, 3),
    }


def child(arguments: argparse.Namespace) -> None:
    cells = parse(arguments.cells)
    llm = engine(arguments.model, arguments.child, cells, json.loads(arguments.options))
    cache = llm.llm_engine.vllm_config.cache_config
    print("RESULT", json.dumps({"capacity": cache.num_gpu_blocks * cache.block_size}), flush=True)
    measure(llm, 2, 256)  # compiles what is compiled at first use
    for batch, context in cells:
        if batch * (context + DECODED) > cache.num_gpu_blocks * cache.block_size:
            result: dict[str, Any] = {"does_not_fit": True}
        else:
            result = measure(llm, batch, context)
        print("RESULT", json.dumps({"cell": f"{batch}x{context}", **result}), flush=True)


def parse(cells: str) -> list[tuple[int, int]]:
    return [tuple(int(x) for x in cell.split("x")) for cell in cells.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default=CELLS, help="batch x context, with commas")
    parser.add_argument("--caches", default=CACHES, help="bf16, fp8, names of recipes")
    parser.add_argument("--options", default="{}", help="more options of vllm.LLM, JSON")
    parser.add_argument("--timeout", type=float, default=900, help="seconds an engine may take")
    parser.add_argument("--out", help="also write the results here, JSON")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(QWEN3_4B))
        for cache in arguments.caches.split(","):
            results[cache] = run(directory, cache, arguments)
    report(results, [f"{b}x{c}" for b, c in parse(arguments.cells)])
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def run(directory: str, cache: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one cache in a process of its own: engines do not give all memory back."""
    command = [sys.executable, __file__, "--child", cache, "--model", directory]
    command += ["--cells", arguments.cells, "--options", arguments.options]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    found: dict[str, Any] = {}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        began = time.monotonic()
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-30:], line]
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found[result.pop("cell", "engine")] = result
                print(f"{cache:28} {line.strip()}", flush=True)
            if time.monotonic() - began > arguments.timeout:
                process.kill()
        if process.wait():
            print(f"{cache}: failed\n{''.join(tail)}", flush=True)
    return found


def report(results: dict[str, Any], cells: list[str]) -> None:
    print("\n| cache | capacity, tokens | " + " | ".join(f"{c}, ms" for c in cells) + " |")
    print("|---|---|" + "---|" * len(cells))
    for cache, found in results.items():
        row = [str(found.get("engine", {}).get("capacity", "failed"))]
        for cell in cells:
            result = found.get(cell, {})
            row.append(
                "does not fit" if "does_not_fit" in result else str(result.get("ms_a_token"))
            )
        print(f"| {cache} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
