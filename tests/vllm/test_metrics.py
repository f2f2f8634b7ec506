"""Metrics: what /metrics of a real server says is what the requests that it served imply."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import BLOCK, engine, tokens
from kakeya_vllm import lib, metrics
from prometheus_client.parser import text_string_to_metric_families
from test_processes import request, server

RECIPE = "kakeya-free-5.3x"
KEPT = [0]  # boundary layers
LAYERS, HEADS, HEAD_DIM = 4, 2, 128  # of the tiny model
SEQS = 16

Samples = dict[str, float]


def parse(text: str, model: str = "m") -> Samples:
    """Value by name of KAKEYA's samples of a model, with the label cache in brackets where there is
    one."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("kakeya_") and sample.labels["model_name"] == model:
                kind = sample.labels.get("cache")
                found[f"{sample.name}[{kind}]" if kind else sample.name] = sample.value
    return found


def sealed_tokens(prompt: int, generated: int, cached: int = 0) -> int:
    """Tokens that a request seals. The last token that it generates is never computed."""
    return (prompt + generated - 1) // BLOCK * BLOCK - cached


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.add_byte_tokenizer(engines.make_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with its processes as they are by default. Its settings are in --additional-config,
    and the shell says something else."""
    settings = {"recipe": RECIPE, "boundary_skip_layers": KEPT}
    arguments = ["--served-model-name", "m", "--max-model-len", "1024", "--enforce-eager"]
    arguments += ["--attention-backend", "KAKEYA", "--max-num-seqs", str(SEQS)]
    arguments += ["--kv-cache-memory-bytes", str(engines.KV_BYTES), "--dtype", "bfloat16"]
    arguments += ["--additional-config", json.dumps({"kakeya": settings})]
    arguments += engines.memory_arguments()
    shell = {"KAKEYA_RECIPE": "kakeya-free-4.0x", "KAKEYA_BOUNDARY_SKIP_LAYERS": "1,2"}
    shell["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    log = tmp_path_factory.mktemp("server") / "log"
    with contextlib.ExitStack() as stack:
        with engines.variables(shell):
            made = stack.enter_context(server(model, log, *arguments))
        yield made


def scrape(address: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        return answer.read().decode()


def eventually(address: str, is_true: Callable[[Samples], bool]) -> Samples:
    """The metrics once they are as wanted: a worker hears of an end with the next step."""
    deadline = time.monotonic() + 30
    while not is_true(found := parse(scrape(address))):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def complete(address: str, prompt: list[int], count: int) -> None:
    body = {"model": "m", "prompt": prompt, "max_tokens": count, "ignore_eos": True}
    with request(address, body) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == count


def test_what_was_configured_is_shown(address: str) -> None:
    text = scrape(address)
    assert f'recipe="{RECIPE}"' in text
    assert "vllm:kv_cache_usage_perc" in text  # beside vLLM's own
    found = parse(text)
    page = lib.load().recipe_page_bytes(RECIPE, HEAD_DIM)
    stock = 2 * HEADS * HEAD_DIM * 2  # bytes of a token in a layer, bf16
    compressed = LAYERS - len(KEPT)
    assert found["kakeya_layers[compressed]"] == compressed
    assert found["kakeya_layers[stock]"] == len(KEPT)
    assert found["kakeya_layers[draft]"] == 0
    assert found["kakeya_kv_bytes_per_token[bfloat16]"] == LAYERS * stock
    per_token = compressed * HEADS * page / BLOCK + len(KEPT) * stock
    assert found["kakeya_kv_bytes_per_token[kakeya]"] == per_token
    slots = SEQS + 16
    assert found["kakeya_open_blocks_limit"] == slots
    allocated = slots + engines.on_gpu()  # there one more, for padding
    assert found["kakeya_open_blocks_bytes"] == allocated * BLOCK * stock * compressed


def test_requests_are_counted(address: str) -> None:
    before = parse(scrape(address))
    load = [(300, 90), (100, 20), (256, 1), (511, 3)]
    with ThreadPoolExecutor() as pool:
        prompts = [tokens(i, length) for i, (length, _) in enumerate(load)]
        list(pool.map(lambda p, c: complete(address, p, c[1]), prompts, load))
    complete(address, prompts[0], 90)  # two of its blocks are in the prefix cache
    expected = sum(sealed_tokens(*one) for one in load) + sealed_tokens(*load[0], cached=256)
    after = eventually(address, lambda found: found["kakeya_open_blocks"] == 0)

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("kakeya_tokens_sealed_total") == expected
    saved = (
        after["kakeya_kv_bytes_per_token[bfloat16]"] - after["kakeya_kv_bytes_per_token[kakeya]"]
    )
    assert grown("kakeya_bytes_saved_total") == expected * saved
    assert 1 <= after["kakeya_open_blocks_peak"] <= len(load)


def test_open_blocks_are_those_in_use(address: str) -> None:
    """While an answer is being written its block is open; when its client goes away, no longer."""
    body = {"model": "m", "prompt": tokens(9, 10), "max_tokens": 900, "ignore_eos": True}
    with request(address, body | {"stream": True}) as answer:
        answer.readline()
        busy = parse(scrape(address))
    assert busy["kakeya_open_blocks"] == 1
    assert busy["kakeya_open_blocks_usage"] == 1 / busy["kakeya_open_blocks_limit"]
    idle = eventually(address, lambda found: found["kakeya_open_blocks"] == 0)
    assert idle["kakeya_open_blocks_usage"] == 0


def test_vllm_bench_serve_measures_it(address: str, model: Path, tmp_path: Path) -> None:
    before = parse(scrape(address))["kakeya_tokens_sealed_total"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--base-url", address, "--model", "m", "--tokenizer", str(model)]
    command += ["--dataset-name", "random", "--random-input-len", "200", "--num-prompts", "6"]
    command += ["--random-output-len", "70", "--ignore-eos", "--save-result", "--save-detailed"]
    command += ["--result-filename", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    pairs = zip(result["input_lens"], result["output_lens"], strict=True)
    expected = sum(sealed_tokens(*pair) for pair in pairs)
    after = parse(scrape(address))["kakeya_tokens_sealed_total"]
    assert after - before == expected > 0


# ---------------------------------------------------------------------------------------------


def registry(model: str) -> Samples:
    """What /metrics of this process, which served other models before, would say of one."""
    from prometheus_client import REGISTRY, generate_latest

    return parse(generate_latest(REGISTRY).decode(), model)


def test_engines_of_one_process_count_on(tiny: Path) -> None:
    options: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": engines.exact_dtype()}
    options["max_num_batched_tokens"] = 2048  # all prompts in one step
    options["served_model_name"] = "counted"
    counts = []
    for _ in range(2):
        with engine(tiny, **options) as made:
            made.run([tokens(i, 300) for i in range(3)], 2)
        found = registry("counted")
        assert found["kakeya_open_blocks_peak"] == 3
        counts.append(found["kakeya_tokens_sealed_total"])
    assert counts[1] - counts[0] == 3 * 256
    with engine(tiny, disable_log_stats=True, **options) as made:
        assert made.runtime.metrics is None
        made.run([tokens(1, 300)], 2)
    assert registry("counted")["kakeya_tokens_sealed_total"] == counts[1]


def test_directory_of_several_api_servers_is_vllms_own(tmp_path: Path) -> None:
    with engines.variables({"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), metrics.VARIABLE: ""}):
        metrics.serve(log_stats=True)
        assert os.environ[metrics.VARIABLE] == str(tmp_path)
        metrics.serve(log_stats=False)
        assert metrics.VARIABLE not in os.environ


@pytest.mark.parametrize("why", ["No such file or directory", "No space left on device"])
def test_an_engine_without_room_for_metrics_says_so_and_serves(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, why)

    if why.startswith("No space"):
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:  # as on another machine
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "elsewhere"))
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(metrics, "_files", {})
    try:
        with engine(tiny, skip_tokenizer_init=True, dtype=engines.exact_dtype()) as made:
            assert made.runtime.metrics is None
            assert len(made.run([tokens(1, 150)], 2)[0].tokens) == 2
    finally:
        logger.removeHandler(caplog.handler)
    assert f"no metrics from this worker: [Errno {2 if 'file' in why else 28}] {why}" in caplog.text
