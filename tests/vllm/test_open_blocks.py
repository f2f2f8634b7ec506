"""Bookkeeping of open blocks, against simulated schedules; no engine."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from kakeya_vllm.open_blocks import (
    SPARE,
    OpenBlockError,
    OpenBlocks,
    OpenBlocksExhausted,
    lookback_tokens,
    pool_size,
)

BLOCK = 128


class Scheduler:
    """A small stand-in for vLLM's scheduler: gives blocks, sends the same kind of output."""

    def __init__(self, num_blocks: int = 64, group: int = 0, groups: int = 1) -> None:
        self.free = list(range(1, num_blocks))  # block 0 is vLLM's null block
        self.blocks: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.finished: set[str] = set()
        self.preempted: set[str] = set()
        self.group, self.groups = group, groups

    def _ids(self, ids: list[int]) -> tuple[list[int], ...]:
        return tuple(ids if g == self.group else [7] * len(ids) for g in range(self.groups))

    def _grow(self, request: str, tokens: int) -> list[int]:
        have = self.blocks.setdefault(request, [])
        new = [self.free.pop() for _ in range(-(-tokens // BLOCK) - len(have))]
        have.extend(new)
        return new

    def drop(self, request: str, *, preempt: bool = False) -> None:
        self.free.extend(self.blocks.pop(request))
        del self.computed[request]
        (self.preempted if preempt else self.finished).add(request)

    def step(
        self,
        new: dict[str, tuple[int, int]] | None = None,  # id -> (hit tokens, tokens)
        running: dict[str, int] | None = None,  # id -> tokens
        resumed: dict[str, tuple[int, int]] | None = None,
        rejected: dict[str, int] | None = None,  # drafts of the step before that were rejected
        shared: dict[str, list[int]] | None = None,  # id -> cached blocks it starts with
    ) -> SimpleNamespace:
        for request, count in (rejected or {}).items():
            self.computed[request] -= count
        scheduled: dict[str, int] = {}
        new_reqs = []
        for request, (hit, count) in (new or {}).items():
            self.blocks[request] = list((shared or {}).get(request, []))
            self._grow(request, hit + count)
            new_reqs.append(
                SimpleNamespace(
                    req_id=request,
                    block_ids=self._ids(self.blocks[request]),
                    num_computed_tokens=hit,
                )
            )
            scheduled[request], self.computed[request] = count, hit + count
        ids, blocks, computed = [], [], []
        for request, (hit, count) in (resumed or {}).items():
            self._grow(request, hit + count)
            ids.append(request)
            blocks.append(self._ids(list(self.blocks[request])))
            computed.append(hit)
            scheduled[request], self.computed[request] = count, hit + count
        for request, count in (running or {}).items():
            start = self.computed[request]
            added = self._grow(request, start + count)
            ids.append(request)
            blocks.append(self._ids(added) if added else None)
            computed.append(start)
            scheduled[request], self.computed[request] = count, start + count
        output = SimpleNamespace(
            scheduled_new_reqs=new_reqs,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=ids,
                new_block_ids=blocks,
                num_computed_tokens=computed,
                resumed_req_ids=set(resumed or ()),
            ),
            num_scheduled_tokens=scheduled,
            finished_req_ids=self.finished,
            preempted_req_ids=self.preempted,
            kv_cache_block_copies=None,
        )
        self.finished, self.preempted = set(), set()
        return output


def make(num_open: int = 8, lookback: int = 0, **kw: int) -> tuple[OpenBlocks, Scheduler]:
    scheduler = Scheduler(**kw)
    return OpenBlocks(64, num_open, group=kw.get("group", 0), lookback=lookback), scheduler


def check_map(open_blocks: OpenBlocks, scheduler: Scheduler) -> None:
    """The tensor holds exactly the slots of the live requests, each once."""
    expected = {}
    for request, blocks in scheduler.blocks.items():
        for index, slot in open_blocks.slots_of(request).items():
            expected[blocks[index]] = slot
    actual = {b: s for b, s in enumerate(open_blocks.open_slot.tolist()) if s >= 0}
    assert actual == expected
    assert len(set(actual.values())) == len(actual) == open_blocks.in_use


def test_whole_blocks_need_no_slot() -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 256)}))
    assert pool.in_use == 0
    check_map(pool, scheduler)


def test_300_tokens_stay_open() -> None:
    """300 tokens are two whole blocks and 44 tokens that stay open."""
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 300)}))
    assert pool.slots_of("a").keys() == {2}
    check_map(pool, scheduler)


def test_decode_crosses_a_block_boundary() -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 127)}))
    slot = pool.slots_of("a")[0]
    pool.update(scheduler.step(running={"a": 1}))  # token 127 fills the block: raw until it is over
    assert pool.slots_of("a") == {0: slot}
    pool.update(scheduler.step(running={"a": 1}))  # token 128 opens the next one
    assert pool.slots_of("a").keys() == {1}
    check_map(pool, scheduler)


def test_chunked_prefill_with_ragged_chunks() -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 200)}))
    assert pool.slots_of("a").keys() == {1}
    pool.update(scheduler.step(running={"a": 200}))  # 200..399: head block 1, tail block 3
    assert pool.slots_of("a").keys() == {1, 3}
    pool.update(scheduler.step(running={"a": 112}))  # 400..511 fills block 3
    assert pool.slots_of("a").keys() == {3}
    pool.update(scheduler.step(running={"a": 128}))  # a whole block
    assert pool.in_use == 0
    check_map(pool, scheduler)


def prefill(new: list[tuple[str, int, list[int]]]) -> SimpleNamespace:
    """A step of new requests: name, tokens, blocks."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=0)
            for name, _, blocks in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
        ),
        num_scheduled_tokens={name: count for name, count, _ in new},
        finished_req_ids=set(),
        preempted_req_ids=set(),
    )


def decode(name: str, start: int, blocks: list[int]) -> SimpleNamespace:
    """A step of one token of one request, which gets these blocks."""
    step = prefill([])
    step.num_scheduled_tokens = {name: 1}
    step.scheduled_cached_reqs = SimpleNamespace(
        req_ids=[name],
        new_block_ids=[(blocks,) if blocks else None],
        num_computed_tokens=[start],
        resumed_req_ids=set(),
    )
    return step


def open_blocks(pool: OpenBlocks) -> list[int]:
    """Blocks with a slot."""
    return (pool.open_slot >= 0).nonzero().flatten().tolist()


def test_blocks_may_be_longer() -> None:
    """The seed's of 512 tokens: 300 tokens are open, 512 are not, 1,000 leave the second open."""
    pool = OpenBlocks(64, 8, block_tokens=512)
    pool.update(prefill([("a", 300, [1]), ("b", 512, [2]), ("c", 1000, [3, 4])]))
    assert [pool.slots_of(name).keys() for name in "abc"] == [{0}, set(), {1}]
    assert open_blocks(pool) == [1, 4]


def test_a_block_may_be_several_pages() -> None:
    """A hybrid model's of 3 pages: slots are of pages, and the map has all of them."""
    pool = OpenBlocks(20, 8, pages_per_block=3)
    assert len(pool.open_slot) == 60
    pool.update(prefill([("a", 300, [5]), ("b", 383, [2]), ("c", 384, [7])]))
    assert pool.blocks_of("a") == [15, 16, 17]
    assert open_blocks(pool) == [2 * 3 + 2, 5 * 3 + 2]
    pool.update(decode("b", 383, []))  # fills its last page
    pool.update(decode("b", 384, [4]))  # opens the first page of another block
    assert pool.blocks_of("b") == [6, 7, 8, 12, 13, 14]
    assert open_blocks(pool) == [4 * 3, 5 * 3 + 2]
    assert pool.sealed_blocks == 2 + 2 + 3 + 1


def test_prefix_hit_starts_at_a_block_boundary() -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 300)}))
    hit = scheduler.blocks["a"][:2]
    pool.update(scheduler.step(new={"b": (256, 50)}, running={"a": 1}, shared={"b": hit}))
    assert pool.slots_of("b").keys() == {2}
    assert pool.slots_of("a").keys() == {2}
    assert pool.in_use == 2


def test_a_hit_inside_a_block_is_an_error() -> None:
    pool, scheduler = make()
    with pytest.raises(OpenBlockError, match="continues inside block 1 at token 200"):
        pool.update(scheduler.step(new={"a": (200, 50)}))


@pytest.mark.parametrize("preempt", [False, True])
def test_aborted_and_preempted_requests_free_their_slots(preempt: bool) -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 300), "b": (0, 10)}))
    assert pool.in_use == 2
    scheduler.drop("a", preempt=preempt)
    pool.update(scheduler.step(running={"b": 1}))
    assert pool.in_use == 1
    assert pool.request_ids == ["b"]
    check_map(pool, scheduler)


def test_freed_blocks_may_be_reused_in_the_same_step() -> None:
    pool, scheduler = make(num_open=1)
    pool.update(scheduler.step(new={"a": (0, 10)}))
    block = scheduler.blocks["a"][0]
    scheduler.drop("a")
    pool.update(scheduler.step(new={"b": (0, 10)}))
    assert scheduler.blocks["b"] == [block]
    check_map(pool, scheduler)


def test_an_id_may_come_back_in_the_step_that_finishes_it() -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 10)}))
    scheduler.drop("a")
    pool.update(scheduler.step(new={"a": (0, 20)}))
    assert pool.in_use == 1
    check_map(pool, scheduler)


def test_preempted_request_resumes_from_a_boundary() -> None:
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 300), "b": (0, 100)}))
    scheduler.drop("a", preempt=True)
    pool.update(scheduler.step(running={"b": 1}))
    pool.update(scheduler.step(running={"b": 1}, resumed={"a": (0, 301)}))
    assert pool.slots_of("a").keys() == {2}
    check_map(pool, scheduler)


def test_preempted_and_resumed_in_one_step() -> None:
    """vLLM's reset_prefix_cache(reset_running_requests=True) does this."""
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 300)}))
    scheduler.drop("a", preempt=True)
    pool.update(scheduler.step(resumed={"a": (0, 301)}))
    assert pool.slots_of("a").keys() == {2}
    check_map(pool, scheduler)


def test_a_known_id_sent_as_new_keeps_its_open_block() -> None:
    """A session that got more input (V1), or a resumed request on the V2 runner."""
    pool, scheduler = make()
    pool.update(scheduler.step(new={"a": (0, 300)}))
    slots = pool.slots_of("a")
    blocks = scheduler.blocks["a"]
    pool.update(scheduler.step(new={"a": (300, 20)}, shared={"a": blocks}))
    assert pool.slots_of("a") == slots
    check_map(pool, scheduler)


def test_rejected_drafts_find_the_block_before_still_open() -> None:
    pool, scheduler = make(lookback=8)
    pool.update(scheduler.step(new={"a": (0, 126)}))
    pool.update(scheduler.step(running={"a": 4}))  # 126..129: both blocks
    assert pool.slots_of("a").keys() == {0, 1}
    pool.update(scheduler.step(running={"a": 4}, rejected={"a": 3}))  # really 127..130
    assert pool.slots_of("a").keys() == {0, 1}
    pool.update(scheduler.step(running={"a": 4}))
    pool.update(scheduler.step(running={"a": 4}))
    pool.update(scheduler.step(running={"a": 4}))  # 143: the first block can no longer change
    assert pool.slots_of("a").keys() == {1}
    check_map(pool, scheduler)


def test_sealed_blocks_are_counted_once() -> None:
    open_blocks, scheduler = make(lookback=8)

    def sealed(**step: object) -> int:
        open_blocks.update(scheduler.step(**step))
        return open_blocks.sealed_blocks

    assert sealed(new={"a": (0, 250)}) == 1
    assert sealed(running={"a": 5}) == 1
    assert sealed(running={"a": 5}, rejected={"a": 4}) == 2  # 251 to 256, drafts among them
    assert sealed(running={"a": 5}, rejected={"a": 4}) == 2  # the same block again
    shared = {"b": scheduler.blocks["a"][:1]}
    assert sealed(new={"b": (128, 200)}, shared=shared) == 3  # the first came from the cache
    scheduler.blocks["b"] = scheduler.blocks["b"][1:]  # "a" gives that one back
    scheduler.drop("b", preempt=True)
    assert sealed(running={"a": 1}) == 3
    assert sealed(resumed={"b": (0, 328)}) == 5  # computed anew, but for its open block


def test_our_group_of_block_ids_is_used() -> None:
    pool, scheduler = make(group=1, groups=3)
    pool.update(scheduler.step(new={"a": (0, 300)}))
    pool.update(scheduler.step(running={"a": 90}))
    check_map(pool, scheduler)


def test_exhaustion_names_the_setting_and_steals_nothing() -> None:
    pool, scheduler = make(num_open=2)
    pool.update(scheduler.step(new={"a": (0, 10), "b": (0, 10)}))
    before = pool.open_slot.clone()
    with pytest.raises(OpenBlocksExhausted, match="--max-num-seqs"):
        pool.update(scheduler.step(new={"c": (0, 10)}))
    assert (pool.open_slot == before).all()


def test_partial_block_copies_are_refused() -> None:
    pool, scheduler = make()
    step = scheduler.step(new={"a": (0, 10)})
    step.kv_cache_block_copies = [object()]
    with pytest.raises(OpenBlockError, match="prefix_match_unit"):
        pool.update(step)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules(seed: int) -> None:
    """Against a model: after each step the open blocks are exactly the partial ones touched."""
    rng = random.Random(seed)
    scheduler = Scheduler(num_blocks=400)
    pool = OpenBlocks(400, 24)
    waiting: list[str] = []
    count = 0
    for _ in range(300):
        for request in list(scheduler.blocks):
            roll = rng.random()
            if roll < 0.03:
                scheduler.drop(request)
            elif roll < 0.06:
                scheduler.drop(request, preempt=True)
                waiting.append(request)
        new, resumed = {}, {}
        if len(scheduler.blocks) < 10 and rng.random() < 0.4:
            count += 1
            new[f"r{count}"] = (0, rng.choice([1, 100, 128, 129, 255, 256, 700]))
        if waiting and rng.random() < 0.3 and len(scheduler.blocks) < 10:
            resumed[waiting.pop()] = (0, rng.choice([1, 128, 333]))
        running = {
            r: 1 if rng.random() < 0.8 else rng.choice([2, 127, 128, 129, 300])
            for r in scheduler.blocks
            if rng.random() < 0.8
        }
        starts = {r: scheduler.computed[r] for r in running}
        pool.update(scheduler.step(new=new, running=running, resumed=resumed))
        check_map(pool, scheduler)
        for request, blocks in scheduler.blocks.items():
            end = scheduler.computed[request]
            slots = pool.slots_of(request)
            if end % BLOCK:
                assert end // BLOCK in slots, "the block that is being filled must be open"
            start = starts.get(request)
            if start is not None and start % BLOCK:
                assert start // BLOCK in slots, "the step reads the raw start of this block"
            assert all(index < len(blocks) for index in slots)
            assert len(slots) <= 2
    for request in list(scheduler.blocks):
        scheduler.drop(request)
    pool.update(scheduler.step())
    assert pool.in_use == 0
    assert pool.request_ids == []


def config(**kw: object) -> SimpleNamespace:
    values = {"max_num_seqs": 256, "long_prefill_token_threshold": 0, "multimodal": False}
    values |= kw
    drafts = values.get("drafts")
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_seqs=values["max_num_seqs"],
            long_prefill_token_threshold=values["long_prefill_token_threshold"],
        ),
        model_config=SimpleNamespace(is_multimodal_model=values["multimodal"]),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=values.get("stages", 1)),
    )


def test_pool_size_and_lookback() -> None:
    assert pool_size(config()) == 256 + SPARE
    assert pool_size(config(drafts=4)) == 512 + SPARE
    assert pool_size(config(long_prefill_token_threshold=200)) == 512 + SPARE
    assert pool_size(config(multimodal=True)) == 512 + SPARE
    assert lookback_tokens(config()) == 0
    assert lookback_tokens(config(drafts=4)) == 8
    assert lookback_tokens(config(drafts=4, stages=3)) == 12
