"""The open-block pool and the pages behind it, against a model of a scheduler: random sequences of
arrivals, chunks, decoding, drafts, aborts, preemption, prefix hits and blocks that change hands.

OpenBlocks decides which block is open where, the real libkakeya writes and attends with what it
decided. The model knows for every request which value each token has: a token is a function of its
text and position, so data of another request, of an earlier life of a block or of a rejected draft
shows in the output. Whatever no live request wrote is NaN before every step.
"""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kakeya_vllm import lib
from kakeya_vllm.open_blocks import OpenBlocks, OpenBlocksExhausted

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

pytestmark = pytest.mark.cpu_only

BLOCK = lib.BLOCK_TOKENS
DIM = 64
LONGEST = 5 * BLOCK
NUM_BLOCKS = 16
RUNNING = 3
DRAFTS = 3
# In flight: the step whose drafts are not judged yet, and the one being scheduled.
LOOKBACK = 2 * DRAFTS


@functools.cache
def codec() -> lib.Codec:
    frequencies = [10000 ** (-2 * i / DIM) for i in range(DIM // 2)]
    shape = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "num_q_heads": 1,
        "head_dim": DIM,
        "max_position": 4096,
        "rope": {"rotary_dim": DIM, "interleaved": False, "inv_freq": frequencies},
    }
    return lib.load().codec("kakeya-free-4.6x", shape)


@functools.cache
def text(name: str) -> torch.Tensor:
    """K and V of every position of a text, float32 [2, LONGEST, D]."""
    seed = [ord(c) for c in name]
    rows = np.random.default_rng(seed).standard_normal((2, LONGEST + DRAFTS, DIM))
    return torch.from_numpy(rows.astype(np.float32))


@functools.cache
def query() -> torch.Tensor:
    return torch.randn(LONGEST + DRAFTS, DIM, generator=torch.Generator().manual_seed(1))


@functools.cache
def opened(texts: tuple[str, ...], index: int) -> torch.Tensor:
    """What block ``index`` gives back through a page, float32 [2, 128, D]; ``texts``: of its
    tokens."""
    first = index * BLOCK
    rows = torch.stack([text(name)[:, first + i] for i, name in enumerate(texts)], 1).contiguous()
    page = torch.zeros(codec().page_bytes(0), dtype=torch.uint8)
    args = lib.SealArgs(num_heads=1, dtype=lib.DTYPE_F32, block_index=index)
    args.k, args.v = rows[0].data_ptr(), rows[1].data_ptr()
    args.k_token_stride = args.v_token_stride = DIM
    args.pages, args.page_head_stride = page.data_ptr(), page.numel()
    codec().seal(args)
    out = torch.empty(2, BLOCK, DIM)
    codec().open(
        0, 0, page.data_ptr(), page.numel(), out[0].data_ptr(), out[1].data_ptr(), BLOCK * DIM
    )
    return out


class Request:
    """A live request: the text of each token so far, the prompt's length, what is computed."""

    def __init__(self, name: str, family: str, shared: int, prompt: int) -> None:
        self.name = name
        self.texts = [family if i < shared else name for i in range(prompt)]
        self.prompt = prompt
        self.blocks: list[int] = []
        self.computed = 0  # truly
        self.unjudged = 0  # rejected drafts of the last step that the scheduler still counts
        self.started = False
        self.lives = 0  # times it was preempted

    def token(self, position: int) -> str:
        """Text of the token at a position, made where generation gets there."""
        while len(self.texts) <= position:
            self.texts.append(self.name)
        return self.texts[position]


class Engine(RuleBasedStateMachine):
    """A scheduler's decisions, and one layer that stores and attends by them."""

    num_open = 2 * RUNNING + 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = OpenBlocks(NUM_BLOCKS, self.num_open, lookback=LOOKBACK)
        self.free = list(range(1, NUM_BLOCKS))  # block 0 is vLLM's null block
        self.holders = [0] * NUM_BLOCKS
        self.cached: dict[tuple[str, ...], int] = {}  # text up to a block's end -> block
        self.running: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.finished: set[str] = set()
        self.preempted: set[str] = set()
        self.count = 0
        self.exhausted = False
        size = codec().page_bytes(0)
        self.pages = torch.full((NUM_BLOCKS, size), 0xFF, dtype=torch.uint8)
        self.rows = torch.full((self.num_open, 2, 1, BLOCK, DIM), float("nan"))

    # ---- what happens to requests ------------------------------------------------------------

    @rule(
        family=strategies.sampled_from("AB"),
        shared=strategies.sampled_from([0, 100, 128, 256, 300]),
        own=strategies.sampled_from([1, 2, 24, 26, 27, 28, 124, 126, 127, 128, 129, 200]),
    )
    def arrive(self, family: str, shared: int, own: int) -> None:
        if len(self.waiting) + len(self.running) < 6:
            self.count += 1
            self.waiting.append(Request(f"r{self.count}", family, shared, shared + own))

    @precondition(lambda self: self.running)
    @rule(data=strategies.data(), how=strategies.sampled_from(["abort", "preempt"]))
    def disturb(self, data: Any, how: str) -> None:
        name = data.draw(strategies.sampled_from(sorted(self.running)))
        if how == "abort":
            self._drop(name)
        else:
            self._preempt(name)

    def _drop(self, name: str) -> Request:
        request = self.running.pop(name)
        for block in request.blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.append(block)
        request.blocks, request.computed, request.unjudged = [], 0, 0
        self.finished.add(name)
        return request

    def _preempt(self, name: str) -> None:
        request = self._drop(name)
        self.finished.discard(name)
        self.preempted.add(name)
        request.lives += 1
        self.waiting.insert(0, request)

    # ---- a step ------------------------------------------------------------------------------

    @rule(data=strategies.data(), rounds=strategies.integers(1, 12))
    def steps(self, data: Any, rounds: int) -> None:
        for _ in range(rounds):
            if self.exhausted or not (self.running or self.waiting):
                break
            self._one_step(data.draw)

    def _one_step(self, draw: Any) -> None:
        """Admit what waits, give every running request some tokens, run the layer, judge drafts."""
        admitted = []
        while (
            self.waiting
            and len(self.running) < RUNNING
            and len(self.free) > 2
            and draw(strategies.integers(0, 3))
        ):
            request = self.waiting.pop(0)
            self._hit(request)
            self.running[request.name] = request
            admitted.append(request)
        plan: dict[str, tuple[int, int, int]] = {}  # reported start, true start, tokens
        fresh: dict[str, list[int]] = {}
        for name in list(self.running):
            request = self.running.get(name)
            if request is None or (
                request not in admitted and draw(strategies.integers(0, 7)) == 7
            ):
                continue
            start = request.computed
            left = request.prompt - start
            drafts = 0
            if left > 1:
                count = draw(strategies.sampled_from([left, min(left, 128), min(left, 60), 1]))
                if count == left - 1:
                    count = left
            else:
                drafts = draw(strategies.integers(0, DRAFTS))
                count = 1 + drafts
            reported = start + request.unjudged
            if reported + count > LONGEST:
                self._drop(name)
                continue
            need = -(-(reported + count) // BLOCK) - len(request.blocks)
            while need > len(self.free):
                others = [r for r in self.running if r != name and r not in plan]
                if not others:
                    break
                self._preempt(others[-1])
            if need > len(self.free):
                self._preempt(name)
                continue
            fresh[name] = [self._take(draw) for _ in range(max(0, need))]
            request.blocks += fresh[name]
            plan[name] = reported, start, count
        plan = {name: p for name, p in plan.items() if name in self.running}
        output = self._output(plan, fresh)
        if not self._follow(output):
            return
        self._check_slots()
        self._poison(plan)
        self._layer({name: (start, count) for name, (_, start, count) in plan.items()})
        for name, (_, start, count) in plan.items():
            request = self.running[name]
            rejected = 0
            if start + 1 >= request.prompt and count > 1:
                rejected = draw(strategies.integers(0, count - 1))
            request.computed = start + count - rejected
            # An asynchronous scheduler learns of it a step late; another at once.
            request.unjudged = rejected if draw(strategies.booleans()) else 0
            for i in range(request.computed, len(request.texts)):
                if i >= request.prompt:
                    # The rejected token's place will hold another text.
                    request.texts[i] = f"{request.texts[i]}'"[:40]
            self._cache(request)

    def _follow(self, output: SimpleNamespace) -> bool:
        """Let the pool take the step in; False if it has no slot, which must be refused well."""
        try:
            self.pool.update(output)
        except OpenBlocksExhausted as error:
            refusal = str(error)
        else:
            return True
        assert self.num_open == SmallPool.num_open, refusal
        assert "--max-num-seqs" in refusal
        # Nothing was taken from anybody: no slot belongs to two blocks.
        slots = [int(slot) for slot in self.pool.open_slot if slot >= 0]
        assert len(set(slots)) == len(slots) == self.num_open
        self.exhausted = True
        return False

    def _hit(self, request: Request) -> None:
        """Blocks of the prefix cache that hold the beginning of the prompt."""
        while True:
            end = (len(request.blocks) + 1) * BLOCK
            block = self.cached.get(tuple(request.texts[:end])) if end < request.prompt else None
            if block is None:
                break
            if not self.holders[block]:
                self.free.remove(block)
            self.holders[block] += 1
            request.blocks.append(block)
        request.computed = len(request.blocks) * BLOCK

    def _take(self, draw: Any) -> int:
        block = self.free.pop(draw(strategies.integers(0, len(self.free) - 1)))
        for key in [key for key, value in self.cached.items() if value == block]:
            del self.cached[key]
        assert not self.holders[block]
        self.holders[block] = 1
        return block

    def _cache(self, request: Request) -> None:
        for index in range(request.computed // BLOCK):
            key = tuple(request.texts[: (index + 1) * BLOCK])
            self.cached.setdefault(key, request.blocks[index])

    def _output(
        self, plan: dict[str, tuple[int, int, int]], fresh: dict[str, list[int]]
    ) -> SimpleNamespace:
        """The step as vLLM's scheduler would send it."""
        new, ids, blocks, computed, resumed = [], [], [], [], set()
        for name, (reported, _, _) in plan.items():
            request = self.running[name]
            whole = (list(request.blocks),)
            if not request.started:
                new.append(
                    SimpleNamespace(req_id=name, block_ids=whole, num_computed_tokens=reported)
                )
            else:
                ids.append(name)
                again = request.lives > 0
                blocks.append(whole if again else (fresh[name],) if fresh[name] else None)
                computed.append(reported)
                if again:
                    resumed.add(name)
            request.started, request.lives = True, 0
        output = SimpleNamespace(
            finished_req_ids=self.finished,
            preempted_req_ids=self.preempted,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=ids,
                new_block_ids=blocks,
                num_computed_tokens=computed,
                resumed_req_ids=resumed,
            ),
            num_scheduled_tokens={name: count for name, (_, _, count) in plan.items()},
            kv_cache_block_copies=None,
        )
        self.finished, self.preempted = set(), set()
        return output

    # ---- the layer ---------------------------------------------------------------------------

    def _poison(self, plan: dict[str, tuple[int, int, int]]) -> None:
        """NaN in every row and page that no live request wrote."""
        written = torch.zeros(self.num_open, BLOCK, dtype=torch.bool)
        sealed = set(self.cached.values())
        for request in self.running.values():
            sealed.update(request.blocks[: request.computed // BLOCK])
            for index, slot in self.pool.slots_of(request.name).items():
                written[slot, : max(0, request.computed - index * BLOCK)] = True
        self.rows.transpose(1, 3).transpose(1, 2)[:, 0][~written] = float("nan")
        for block in range(NUM_BLOCKS):
            if block not in sealed:
                self.pages[block] = 0xFF

    def _layer(self, plan: dict[str, tuple[int, int]]) -> None:
        """kakeya_write and kakeya_attend of the step, and the outputs against the model."""
        if not plan:
            return
        starts, lens, slots, positions, rows, queries = [0], [], [], [], [], []
        table = torch.zeros(len(plan), LONGEST // BLOCK + 1, dtype=torch.int32)
        for i, (name, (start, count)) in enumerate(plan.items()):
            request = self.running[name]
            starts.append(starts[-1] + count)
            lens.append(start + count)
            table[i, : len(request.blocks)] = torch.tensor(request.blocks)
            for position in range(start, start + count):
                block = request.blocks[position // BLOCK]
                slots.append(block * BLOCK + position % BLOCK)
                positions.append(position)
                rows.append(text(request.token(position))[:, position])
                queries.append(query()[position])
        keys, values = torch.stack(rows, 1).contiguous()
        q = torch.stack(queries).contiguous()
        out = torch.full_like(q, float("nan"))
        arrays = [
            torch.tensor(slots, dtype=torch.int64),
            *(torch.tensor(x, dtype=torch.int32) for x in (positions, starts, lens)),
        ]
        write = lib.WriteArgs(struct_size=ctypes.sizeof(lib.WriteArgs), num_heads=1)
        attend = lib.AttendArgs(struct_size=ctypes.sizeof(lib.AttendArgs), num_kv_heads=1)
        for args in (write, attend):
            args.dtype, args.num_tokens, args.num_blocks = lib.DTYPE_F32, len(q), NUM_BLOCKS
            args.num_open, args.open_blocks = self.num_open, self.rows.data_ptr()
            args.open_slot = self.pool.open_slot.data_ptr()
            args.k, args.v = keys.data_ptr(), values.data_ptr()
            for stride in ("k_token", "k_head", "v_token", "v_head"):
                setattr(args, f"{stride}_stride", DIM)
            args.pages = self.pages.data_ptr()
            args.page_block_stride = args.page_head_stride = self.pages.shape[1]
        write.slot_mapping, write.positions = arrays[0].data_ptr(), arrays[1].data_ptr()
        attend.num_q_heads, attend.num_seqs, attend.scale = 1, len(plan), 0.2
        attend.max_blocks_per_seq = attend.block_table_stride = table.shape[1]
        attend.q, attend.out, attend.block_table = q.data_ptr(), out.data_ptr(), table.data_ptr()
        for stride in ("q_token", "q_head", "out_token", "out_head"):
            setattr(attend, f"{stride}_stride", DIM)
        attend.query_start, attend.seq_lens = arrays[2].data_ptr(), arrays[3].data_ptr()
        codec().write(write)
        codec().attend(attend)
        for i, (name, (start, count)) in enumerate(plan.items()):
            want = self._expected(self.running[name], start, count)
            got = out[starts[i] : starts[i + 1]].double()
            error = float((got - want).norm() / want.norm())
            assert error < 1e-3, f"{name}, tokens {start} to {start + count}: {error}"

    def _expected(self, request: Request, start: int, count: int) -> torch.Tensor:
        """Attention in float64 over what the request's own tokens are: pages before the step's
        first block, raw rows from there on."""
        pages = start // BLOCK
        texts = [request.token(i) for i in range(start + count)]
        parts = [opened(tuple(texts[i * BLOCK : (i + 1) * BLOCK]), i) for i in range(pages)]
        raw = [text(texts[i])[:, i : i + 1] for i in range(pages * BLOCK, start + count)]
        k, v = torch.cat([*parts, *raw], 1).double()
        q = query()[start : start + count].double()
        scores = q @ k.T * 0.2
        hidden = torch.arange(start + count)[None] > torch.arange(start, start + count)[:, None]
        return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v

    # ---- the pool ----------------------------------------------------------------------------

    def _check_slots(self) -> None:
        """The map holds the live requests' slots, each once, and nothing else."""
        held: dict[int, int] = {}
        for request in self.running.values():
            for index, slot in self.pool.slots_of(request.name).items():
                held[request.blocks[index]] = slot
        assert len(set(held.values())) == len(held)
        assert held == {
            block: int(slot) for block, slot in enumerate(self.pool.open_slot) if slot >= 0
        }
        assert self.pool.in_use == len(held) <= self.num_open

    def teardown(self) -> None:
        if self.exhausted:
            return
        for name in list(self.running):
            self._drop(name)
        self.pool.update(self._output({}, {}))
        assert self.pool.in_use == 0
        assert sorted(self.free) == list(range(1, NUM_BLOCKS))


class SmallPool(Engine):
    """The same with too few open blocks: exhaustion is refused and takes nobody's slot."""

    num_open = 2


# Every run the same examples: a failure in CI is the one to be seen at home.
_OPTIONS = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestEngine = Engine.TestCase
TestEngine.settings = _OPTIONS
TestSmallPool = SmallPool.TestCase
TestSmallPool.settings = _OPTIONS
