#!/usr/bin/env python3
"""Soak: one vLLM engine under a random load, every answer compared with its answer alone.

    .venv/bin/python scripts/soak.py --minutes 10 --seed 1     # or: make soak MINUTES=10 SEED=1

Requests of random lengths arrive in bursts, share prefixes, go on from earlier answers, are aborted
in any state and preempted by a cache that is far too small, with prompts in chunks, prefix caching
and n-gram drafts. Blocks and open-block slots that are free are overwritten with NaN all the time.

Before the load, a process of its own computes every answer alone: one request at a time, the prompt
in one piece, no prefix caching, no drafts. What must then hold:

* On the CPU (float32, sealed prefill) every answer and every log-probability is the same bit for
  bit. Sealed prefill makes a token independent of chunks, prefix hits, preemption and drafts, but
  for the order of sums; and a product's order of sums depends on its number of rows, so products
  run 8 rows at a time here (``invariant_products``), as vLLM's batch-invariant mode fixes them on a
  GPU.
* With raw prefill, the only one of a GPU (there in bfloat16, batch-invariant mode, full CUDA
  graphs), the same holds for requests whose prompt was computed in one piece. A prompt in pieces
  reads pages for what came before, as does a preempted request when it comes back, and pages lose
  what the recipe loses: such answers are held to what pieces do to an answer alone. (On the CPU
  drafts that reach over the end of a block read differently as well, so ``--prefill raw`` compares
  bit for bit only with ``--drafts 0``.)
* An aborted request gave a beginning of its answer.
* Whenever nothing runs: no open block is in use, all KV blocks are free. Memory of the process does
  not grow.

The load depends on the seed only, not on time. What fails is printed with the command that repeats
it; the exit status is 1 then. ``--cache stock`` runs the same load without KAKEYA, as a control.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "vllm"))

import engines  # noqa: E402

BLOCK = engines.BLOCK
MAX_LEN = 1280  # tokens of a request: 10 blocks
BLOCKS = 17  # of the cache, one of them vLLM's null block: the longest request and a half
MAX_SEQS = 8
CHUNK = 256  # tokens of a step
DRAFTS = 3
IN_FLIGHT = 14  # requests that run or wait at most
POISON_EVERY = 5  # steps
# Root mean square difference of log-probabilities that pieces of a prompt may make, in units of
# what they make alone in steps of CHUNK tokens. Under load pieces are smaller (what is left of a
# step), a preempted request is cut once more, and the sample is small.
WITHIN_PIECES = 2.0
# Growth of resident memory, from the end of the warm-up to the end, that is no leak: arenas of the
# allocators and tables of Python that fill up. Bytes.
FLAT = 24 * 2**20
WARM_UP = 0.25  # of the load


@dataclass
class Entry:
    """A prompt and its answer alone."""

    prompt: list[int]
    count: int  # tokens of the answer
    kind: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Request:
    """One arrival of an entry: what happened to it."""

    entry: int
    abort_after: int | None = None  # steps
    steps: int = 0
    cached: int = 0  # tokens of prefix hits at its start
    pieces: int = 0  # steps that computed a part of the prompt
    preempted: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether its prompt was computed in one piece, once."""
        return self.cached == 0 and self.pieces <= 1 and self.preempted == 0


class Failure(Exception):
    """A request whose answer is wrong, or a state that must not be."""


# --- prompts --------------------------------------------------------------------------------


class Prompts:
    """An endless, seeded list of prompts: fresh ones, with a shared beginning, with repetitions
    that n-gram drafts can guess, and ones that go on from an earlier answer."""

    def __init__(self, seed: int, source: list[int] | None, vocab: int) -> None:
        self.rng = random.Random(seed)
        self.source, self.vocab = source, vocab
        self.shared = [self._text(self.rng.choice([256, 300, 511, 640])) for _ in range(5)]

    def _text(self, length: int) -> list[int]:
        if self.source is None:
            return [self.rng.randrange(3, self.vocab) for _ in range(length)]
        start = self.rng.randrange(len(self.source) - length)
        return self.source[start : start + length]

    def next(self, done: list[Entry]) -> Entry:
        """The next one; ``done``: entries so far, with their answers."""
        rng = self.rng
        count = rng.choice([rng.randint(1, 8), rng.randint(10, 60), rng.randint(60, 200)])
        kind = rng.choice(["fresh", "edge", "shared", "shared", "repeated", "goes on"])
        if kind == "goes on":
            old = rng.choice(done[-20:]) if done else None
            if old and len(old.prompt) + len(old.tokens) + 60 + count <= MAX_LEN:
                prompt = old.prompt + old.tokens + self._text(rng.randint(1, 60))
                return Entry(prompt, count, kind)
            kind = "fresh"
        if kind == "shared":
            prompt = rng.choice(self.shared) + self._text(rng.randint(1, 200))
        elif kind == "repeated":
            phrase = self._text(rng.randint(8, 50))
            prompt = (phrase * 9)[: rng.randint(20, 300)]
        elif kind == "edge":
            prompt = self._text(BLOCK * rng.randint(1, 5) + rng.randint(-2, 2))
        else:
            prompt = self._text(rng.choice([rng.randint(1, 60), rng.randint(60, 900)]))
        return Entry(prompt, count, kind)


# --- engines --------------------------------------------------------------------------------


def invariant_products() -> None:
    """On the CPU: products of the model's matrices 8 rows at a time, the last rows padded.

    A row's sums then come in one order whatever else is in the step; vLLM's own product serves.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        original(layer, remove_weight)
        inner = layer.cpu_linear

        def product(x: Any, weight: Any, bias: Any) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            rows = flat.shape[0]
            padded = torch.nn.functional.pad(flat, (0, 0, 0, -rows % 8))
            parts = [inner(part.contiguous(), weight, bias) for part in padded.split(8)]
            return torch.cat(parts)[:rows].reshape(*x.shape[:-1], -1)

        layer.cpu_linear = product

    utils.dispatch_cpu_unquantized_gemm = dispatch


def make_llm(model: Path, cache: str, **options: Any) -> Any:
    """An engine in this process, with what both sides of the comparison share."""
    from vllm import LLM

    invariant_products()
    arguments: dict[str, Any] = {
        "dtype": engines.exact_dtype(),
        "max_model_len": MAX_LEN,
        "kv_cache_memory_bytes": engines.KV_BYTES,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "enforce_eager": True,
    }
    if cache == "kakeya":
        arguments["attention_backend"] = "KAKEYA"
    else:
        arguments["block_size"] = BLOCK
    if engines.on_gpu():
        arguments["gpu_memory_utilization"] = 0.2
        arguments["enforce_eager"] = False
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return LLM(str(model), **arguments | options)


def sampling(count: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False
    )


def chosen(output: Any) -> tuple[list[int], list[float]]:
    """Tokens of an output so far and the log-probability of each."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return tokens, [e[t].logprob for t, e in zip(tokens, completion.logprobs, strict=True)]


def source_of(model: Path) -> tuple[list[int] | None, int]:
    """Token ids to cut prompts from (None: draw them), and the size of the vocabulary."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    if not (model / "tokenizer.json").is_file():
        return None, vocab
    from kakeya_vllm.text import BUNDLED_TEXT, read_text, tokenise

    return tokenise(str(model), read_text(BUNDLED_TEXT)), vocab


def compute_alone(job: dict[str, Any]) -> list[Entry]:
    """Answers of a job's prompts, each alone, until there are enough or time is up.

    With ``entries`` given, exactly those.
    """
    model = Path(job["model"])
    llm = make_llm(
        model,
        job["cache"],
        max_num_seqs=1,
        max_num_batched_tokens=job.get("chunk", 2048),  # 2048: prompts in one piece
        enable_prefix_caching=False,
    )
    given = [Entry(**entry) for entry in job.get("entries", [])]
    prompts = Prompts(job["seed"], *source_of(model))
    done: list[Entry] = []
    until = time.monotonic() + job["seconds"]
    while len(done) < (len(given) or job["most"]):
        if not given and len(done) >= 8 and time.monotonic() > until:
            break
        entry = given[len(done)] if given else prompts.next(done)
        (output,) = llm.generate(
            {"prompt_token_ids": entry.prompt}, sampling(entry.count), use_tqdm=False
        )
        entry.tokens, entry.logprobs = chosen(output)
        done.append(entry)
    return done


def alone(**job: Any) -> list[Entry]:
    """:func:`compute_alone` in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="kakeya-soak-") as directory:
        ask, answer = Path(directory, "ask.json"), Path(directory, "answer.json")
        ask.write_text(json.dumps(job))
        subprocess.run(
            [sys.executable, __file__, "--alone", str(ask), str(answer)],
            stdout=sys.stderr,
            check=True,
        )
        return [Entry(**entry) for entry in json.loads(answer.read_text())]


# --- the load -------------------------------------------------------------------------------


class Load:
    """An engine under load."""

    def __init__(
        self, llm: Any, entries: list[Entry], seed: int, cache: str, spoil: int | None = None
    ) -> None:
        """``spoil``: the step from which a row that is in use is made wrong, to see it found."""
        self.llm, self.core, self.entries = llm, llm.llm_engine, entries
        self.spoil = spoil
        self.rng = random.Random(seed + 1)
        self.compressed = cache == "kakeya"
        self.sealed = os.environ.get("KAKEYA_PREFILL") == "sealed"
        drafts = llm.llm_engine.vllm_config.speculative_config
        self.drafts = drafts.num_speculative_tokens if drafts else 0
        self.drafts_are_exact = engines.on_gpu() or not drafts
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        (self.worker,) = llm.collective_rpc(lambda worker: worker)
        self.live: dict[str, Request] = {}
        self.number = self.steps = 0
        self.counts = dict.fromkeys(
            ("finished", "aborted", "whole", "chunked", "prefix_hits", "preempted_requests"), 0
        )
        self.counts |= {"poisoned_blocks": 0, "poisoned_slots": 0, "idle_checks": 0}
        self.compared = 0  # tokens
        self.different = 0  # requests not bit for bit the same, where that is not asked for
        self.squares: list[float] = []  # of differences of log-probabilities, in pieces
        self.resident: list[tuple[int, int]] = []  # (requests so far, bytes), whenever idle
        self._watch()

    def _watch(self) -> None:
        """Learn from the scheduler's outputs how each request was computed."""
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            step = schedule(*args, **kwargs)
            cached = step.scheduled_cached_reqs
            for name in step.preempted_req_ids or ():
                if (request := self._of(name)) is not None:
                    request.preempted += 1
            starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for new in step.scheduled_new_reqs:
                starts[new.req_id] = new.num_computed_tokens
                request = self._of(new.req_id)
                if request is not None and not request.pieces:
                    request.cached = new.num_computed_tokens
            for name, start in starts.items():
                request = self._of(name)
                if request is not None and start < len(self.entries[request.entry].prompt):
                    request.pieces += 1
            return step

        self.scheduler.schedule = watched

    def _of(self, internal: str) -> Request | None:
        # vLLM adds random characters to the name that it was given.
        return self.live.get(internal.split("-")[0])

    def run(self, until: Any) -> None:
        """Load until ``until()``, then let everything finish."""
        mood = 0.2
        while not until():
            if self.rng.random() < 0.01:
                mood = self.rng.choice([0.05, 0.2, 0.7, 0.0])
            if mood == 0.0:  # a pause, until nothing is left
                self._drain()
                mood = 0.7
            if len(self.live) < IN_FLIGHT and self.rng.random() < mood:
                for _ in range(self.rng.randint(1, 4)):
                    self._arrive()
            self._step()
        self._drain()

    def _arrive(self) -> None:
        index = self.rng.randrange(len(self.entries))
        if self.rng.random() < 0.3:  # the same few again: more prefix hits
            index %= 8
        request = Request(index)
        if self.rng.random() < 0.15:
            request.abort_after = self.rng.choice([0, self.rng.randint(1, 80)])
        name = f"r{self.number}"
        self.number += 1
        self.live[name] = request
        entry = self.entries[index]
        self.core.add_request(name, {"prompt_token_ids": entry.prompt}, sampling(entry.count))

    def _step(self) -> None:
        for name, request in list(self.live.items()):
            if request.abort_after is not None and request.steps >= request.abort_after:
                self.core.abort_request([name])
                self._compare(name, self.live.pop(name), whole_answer=False)
                self.counts["aborted"] += 1
            request.steps += 1
        if self.compressed and self.steps % POISON_EVERY == 0:
            self._poison()
        if self.spoil is not None and self.steps >= self.spoil:
            self._spoil()
        self.steps += 1
        for output in self.core.step():
            request = self.live.get(output.request_id)
            if request is None:
                continue  # aborted while its step ran
            request.tokens, request.logprobs = chosen(output)
            if output.finished:
                self._compare(output.request_id, self.live.pop(output.request_id))
                self.counts["finished"] += 1

    def _compare(self, name: str, request: Request, *, whole_answer: bool = True) -> None:
        """Against the answer alone; raises Failure."""
        entry = self.entries[request.entry]
        self.counts["whole"] += request.whole
        self.counts["chunked"] += request.pieces > 1
        self.counts["prefix_hits"] += request.cached > 0
        self.counts["preempted_requests"] += request.preempted > 0
        count = len(request.tokens)
        if whole_answer and count != entry.count:
            raise Failure(f"{name} gave {count} tokens of {entry.count}: {self._about(request)}")
        self.compared += count
        same = request.tokens == entry.tokens[:count]
        if same and request.logprobs == entry.logprobs[:count]:
            return
        if self.exact(request):
            pairs = zip(
                request.tokens, entry.tokens, request.logprobs, entry.logprobs, strict=False
            )
            at, (got, want, p, q) = next(
                (i, x) for i, x in enumerate(pairs) if x[0] != x[1] or x[2] != x[3]
            )
            raise Failure(
                f"{name} differs from its answer alone at token {at} of {entry.count}: {got} "
                f"(log-probability {p!r}) instead of {want} ({q!r}): {self._about(request)}"
            )
        self.different += 1
        self.squares += differences(request.tokens, entry.tokens, request.logprobs, entry.logprobs)

    def exact(self, request: Request) -> bool:
        """Whether the answer must be the one alone bit for bit; see the top of this file."""
        if not self.compressed:
            return False
        if self.sealed:
            return True
        # vLLM takes a prompt that is no longer than a step of decoding for one: the kernel reads it
        # then, which alone FlashAttention reads, and sums come in another order.
        as_decoding = len(self.entries[request.entry].prompt) <= 1 + self.drafts
        return request.whole and self.drafts_are_exact and not as_decoding

    def _about(self, request: Request) -> str:
        entry = self.entries[request.entry]
        return (
            f"prompt {request.entry} ({entry.kind}, {len(entry.prompt)} tokens), step "
            f"{self.steps}, {request.cached} tokens hit, prompt in {request.pieces} steps, "
            f"preempted {request.preempted} times"
        )

    def _drain(self) -> None:
        """Let everything finish; then nothing may be held."""
        while self.live:
            self._step()
        for _ in range(4):  # steps under way, and one that tells the worker who has finished
            self.core.step()
        self.counts["idle_checks"] += 1
        free, total = self.pool.get_num_free_blocks(), self.pool.num_gpu_blocks - 1
        if free != total:
            raise Failure(f"nothing runs, and {free} of {total} KV blocks are free")
        if self.compressed:
            held = self.worker._kakeya.open_blocks
            if held.in_use or held.request_ids or int((held.open_slot >= 0).sum()):
                raise Failure(f"nothing runs, and {held.in_use} open blocks are in use")
        if self.rng.random() < 0.3 and not self.llm.reset_prefix_cache():
            raise Failure("nothing runs, and the prefix cache cannot be reset")
        gc.collect()
        self.resident.append((self.number, resident_bytes() + device_bytes()))

    def _poison(self) -> None:
        """NaN into every slot that is free, bytes of NaN into every block that nobody may read."""
        free = [
            block.block_id
            for block in self.pool.blocks
            if block.ref_cnt == 0 and block.block_hash is None and not block.is_null
        ]
        runtime = self.worker._kakeya
        slots = list(runtime.open_blocks._free)
        for layer in runtime.layers.values():
            layer.kv_cache[free] = 0xFF
            layer.impl.open_pool[slots] = float("nan")
        self.counts["poisoned_blocks"] += len(free)
        self.counts["poisoned_slots"] += len(slots)

    def _spoil(self) -> None:
        """Change the first rows of an open block that is in use, once there is one."""
        held = self.worker._kakeya.open_blocks
        slots = [slot for name in held.request_ids for slot in held.slots_of(name).values()]
        for layer in self.worker._kakeya.layers.values():
            layer.impl.open_pool[slots, :, :, :8] *= -1
        self.spoil = None if slots else self.spoil


def resident_bytes() -> int:
    """Memory of this process that is resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int:
    """Memory of the GPU that torch's tensors take."""
    import torch

    return torch.cuda.memory_allocated() if engines.on_gpu() else 0


def metrics(llm: Any) -> dict[str, int]:
    names = {
        "vllm:num_preemptions": "preemptions",
        "vllm:prefix_cache_hits": "prefix_hit_tokens",
        "vllm:spec_decode_num_draft_tokens": "draft_tokens",
        "vllm:spec_decode_num_accepted_tokens": "accepted_drafts",
    }
    found = dict.fromkeys(names.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in names:
            found[names[metric.name]] += int(metric.value)
    return found


def memory(samples: list[tuple[int, int]], requests: int) -> dict[str, float]:
    """MiB, resident and on the device, after the warm-up and at the end, each the median of the
    idle moments around."""
    warm = [m for n, m in samples if n >= WARM_UP * requests] or [samples[-1][1]]
    edge = max(1, len(warm) // 5)

    def median(values: list[int]) -> float:
        return sorted(values)[len(values) // 2] / 2**20

    first, last = median(warm[:edge]), median(warm[-edge:])
    return {"warm_mib": first, "end_mib": last, "growth_mib": last - first}


def differences(
    first: list[int], second: list[int], p: list[float], q: list[float]
) -> Iterator[float]:
    """Squares of the differences of log-probabilities, up to where the tokens part: what follows
    is another text."""
    for s, t, x, y in zip(first, second, p, q, strict=False):
        if s != t:
            return
        yield (x - y) ** 2


def rms(squares: list[float]) -> float:
    return (sum(squares) / max(1, len(squares))) ** 0.5


def pieces_move(entries: list[Entry], chunk: int, **job: Any) -> float:
    """By how much a prompt in pieces moves log-probabilities: root mean square of the differences
    between answers alone, the prompt whole and in steps of ``chunk`` tokens."""
    longer = [entry for entry in entries if len(entry.prompt) > chunk + BLOCK][:40]
    cut = alone(entries=[asdict(entry) for entry in longer], chunk=chunk, **job)
    squares: list[float] = []
    for a, b in zip(longer, cut, strict=True):
        squares += differences(a.tokens, b.tokens, a.logprobs, b.logprobs)
    return rms(squares)


def soak(args: argparse.Namespace, model: Path) -> tuple[dict[str, Any], list[str]]:
    """The whole soak: figures, and what was wrong."""
    started = time.monotonic()
    seconds = 60 * args.minutes
    job = {"model": str(model), "seed": args.seed, "seconds": 0.35 * seconds, "most": args.prompts}
    entries = alone(cache=args.cache, **job)
    say(f"{len(entries)} answers alone in {time.monotonic() - started:.0f} s")
    problems: list[str] = []
    figures: dict[str, Any] = {"seed": args.seed, "prompts": len(entries), "cache": args.cache}
    moved = None
    if args.prefill == "raw" and args.cache == "kakeya":
        moved = figures["pieces_rms"] = pieces_move(entries, CHUNK, cache=args.cache, **job)

    options: dict[str, Any] = {}
    if args.drafts:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": args.drafts,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    llm = make_llm(
        model,
        args.cache,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=CHUNK,
        num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=True,
        **options,
    )
    load = Load(llm, entries, args.seed, args.cache, args.spoil)
    load_started = time.monotonic()
    until = started + seconds

    def ended() -> bool:
        return load.number >= args.requests if args.requests else time.monotonic() > until

    try:
        load.run(ended)
    except Failure as failure:
        problems.append(str(failure))
    except Exception as error:  # the engine's own: which requests it ran is part of the report
        traceback.print_exc()
        running = [f"{name}: {load._about(request)}" for name, request in load.live.items()]
        problems.append("\n  ".join([f"the engine failed: {error!r}; it ran", *running]))
    figures |= {"requests": load.number, "steps": load.steps, "tokens_compared": load.compared}
    figures |= {"seconds_of_load": round(time.monotonic() - load_started)}
    figures |= load.counts | metrics(llm)
    figures["async_scheduling"] = bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling)
    figures["different"], figures["different_rms"] = load.different, rms(load.squares)
    if load.compressed:
        figures["peak_open_blocks"] = load.worker._kakeya.open_blocks.peak
    if load.resident:
        figures |= memory(load.resident, load.number)
    if moved is not None and rms(load.squares) > WITHIN_PIECES * moved:
        problems.append(
            f"answers of prompts in pieces are {rms(load.squares):.4f} (root mean square of "
            f"log-probabilities) from those alone; pieces alone make {moved:.4f}"
        )
    if figures.get("growth_mib", 0) * 2**20 > FLAT:
        problems.append(f"memory grew by {figures['growth_mib']:.0f} MiB")
    return figures, problems


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


def missing(figures: dict[str, Any]) -> Iterator[str]:
    """What the load was meant to make happen and did not."""
    expected = ["finished", "aborted", "whole", "chunked", "prefix_hits", "preemptions"]
    if figures["draft_tokens"]:
        expected.append("accepted_drafts")
    return (name for name in expected if not figures[name])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of the whole run (5)")
    parser.add_argument("--requests", type=int, default=0, help="load ends after so many, instead")
    parser.add_argument("--prompts", type=int, default=2000, help="different prompts, at most")
    parser.add_argument("--seed", type=int, default=None, help="of prompts and load (random)")
    parser.add_argument("--model", type=Path, help="directory of a model (a tiny random one)")
    parser.add_argument("--drafts", type=int, default=DRAFTS, help=f"n-gram drafts ({DRAFTS})")
    parser.add_argument("--prefill", choices=["raw", "sealed"], help="sealed on the CPU, else raw")
    parser.add_argument("--cache", choices=["kakeya", "stock"], default="kakeya")
    parser.add_argument("--spoil", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in (engines.ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}).items():
        os.environ.setdefault(name, value)
    # One thread pool waits while the other works; see kakeya_vllm/engine.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would win over kv_cache_memory_bytes
    if not args.alone:  # the child is told by the variable
        args.prefill = args.prefill or ("raw" if engines.on_gpu() else "sealed")
        os.environ["KAKEYA_PREFILL"] = args.prefill
    os.environ |= engines.INVARIANT if engines.on_gpu() else {}
    if args.alone:
        ask, answer = args.alone
        answer.write_text(
            json.dumps([asdict(e) for e in compute_alone(json.loads(ask.read_text()))])
        )
        return 0

    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10**6)
    say(f"seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="kakeya-soak-") as directory:
        model = args.model or engines.make_tiny_model(Path(directory))
        figures, problems = soak(args, model)
    for name in missing(figures):
        say(f"did not occur: {name}")
    for problem in problems:
        say(f"FAILED: {problem}")
    if problems:
        again = (
            f"--seed {args.seed} --prompts {figures['prompts']} --requests {figures['requests']}"
        )
        again += f" --drafts {args.drafts} --prefill {args.prefill} --cache {args.cache}"
        say(f"again: {again}" + (f" --model {model}" if args.model else ""))
    figures["problems"] = problems
    print(json.dumps(figures))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
