"""Open blocks: which raw block of the pool belongs to which KV-cache block, kept exactly.

A block that is not full cannot be a page yet; its tokens lie raw in an *open block*. Each layer
has a pool of them, ``[num_open][2 (K, V)][heads][block][head_dim]``, with a block of 128 tokens, or
of 512 for the seed's recipes; a slot index means the same sequence in every layer, so one map
``open_slot[block_id] -> slot`` (int32, -1 = none) serves all.

Slots are followed per request from what the scheduler says in each step, never guessed from
tensors: only the scheduler knows that a request was aborted or preempted and that its block ids
now belong to somebody else. The rules, with ``c`` tokens computed before a step and ``n`` new:

* A block that [c, c+n) touches and does not cover whole needs a slot during the step: it reads or
  keeps raw tokens. A block that is covered whole is sealed straight from K and V.
* A slot is free once its block is full and cannot be written again. Without speculative decoding
  that is as soon as the step that filled it is over. With it, the scheduler's ``c`` counts drafts
  that may be rejected, so the block before stays for ``lookback`` more tokens.
* Finished, aborted and preempted requests free all their slots. A resumed one starts again at a
  block boundary.

A live slot is never taken: if none is free, OpenBlocksExhausted names the setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from kakeya_vllm.lib import BLOCK_TOKENS

# Slots beyond one a sequence: a prompt whose chunk begins and ends inside a block holds two, and
# the scheduler leaves few prompts in that state at once (it fills the token budget in order).
SPARE = 16


class OpenBlocksExhausted(RuntimeError):
    """No free slot: more partial blocks are alive than the pool was sized for."""


class OpenBlockError(RuntimeError):
    """The scheduler's output contradicts what was followed so far."""


def pool_size(vllm_config: Any) -> int:
    """Slots of the pool: what this configuration can hold open at once.

    One a running sequence; two where every sequence may hold two at once: with speculative
    decoding (the block before stays open), with a chunk length of its own for long prompts, and
    with multimodal inputs (their chunks end where an image does).
    """
    scheduler = vllm_config.scheduler_config
    double = (
        vllm_config.speculative_config is not None
        or scheduler.long_prefill_token_threshold > 0
        or vllm_config.model_config.is_multimodal_model
    )
    return scheduler.max_num_seqs * (2 if double else 1) + SPARE


def lookback_tokens(vllm_config: Any) -> int:
    """By how many tokens the scheduler's count may run ahead of the truth.

    Each step in flight may carry num_speculative_tokens drafts that are rejected; asynchronous
    scheduling keeps two steps in flight, pipeline parallelism one a stage.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return 0
    in_flight = max(2, vllm_config.parallel_config.pipeline_parallel_size)
    return speculative.num_speculative_tokens * in_flight


@dataclass
class _Request:
    """What is known of a live request: its blocks in order, and slot by index of block."""

    block_ids: list[int]
    slots: dict[int, int] = field(default_factory=dict)
    computed: int = 0  # tokens computed once the latest step it was in is over
    sealed: int = 0  # blocks that were counted as sealed, or that it got from the prefix cache


class OpenBlocks:
    """The map from block id to slot for one KV-cache group, updated once a step."""

    def __init__(
        self,
        num_blocks: int,
        num_open: int,
        *,
        group: int = 0,
        lookback: int = 0,
        block_tokens: int = BLOCK_TOKENS,
        pages_per_block: int = 1,
    ):
        """``num_blocks``: of the KV cache; ``group``: index of our KV-cache group in the tuples
        of block ids; ``lookback``: see :func:`lookback_tokens`; ``block_tokens``: of a page.

        ``pages_per_block``: of the scheduler's blocks. With more than one, a block stands for that
        many of its own here, as in vLLM's block tables: page ``j`` of block ``b`` is
        ``b * pages_per_block + j``.
        """
        self.num_open = num_open
        self._block = block_tokens
        self._pages_per_block = pages_per_block
        self.open_slot = torch.full((num_blocks * pages_per_block,), -1, dtype=torch.int32)
        self.peak = 0
        self.sealed_blocks = 0  # so far; one that rejected drafts filled is counted once
        self._map = self.open_slot.numpy()  # the same memory; item access is far cheaper
        self._group = group
        self._lookback = lookback
        # Lowest first, so that a lightly loaded engine touches few pages of the pool's memory.
        self._free = list(range(num_open - 1, -1, -1))
        self._requests: dict[str, _Request] = {}
        self._changed: set[int] = set()

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Blocks whose slot changed since the last call, and their slots now: for a copy of the map
        that lives elsewhere."""
        blocks = sorted(self._changed)
        self._changed.clear()
        return blocks, [int(self._map[block]) for block in blocks]

    @property
    def in_use(self) -> int:
        """Slots held now."""
        return self.num_open - len(self._free)

    @property
    def request_ids(self) -> list[str]:
        """Requests followed now; a finished one until the next step says so."""
        return list(self._requests)

    def slots_of(self, request_id: str) -> dict[int, int]:
        """Slot by index of block in the request; empty for an unknown request."""
        request = self._requests.get(request_id)
        return dict(request.slots) if request else {}

    def blocks_of(self, request_id: str) -> list[int]:
        """Block ids of a request in order; empty for an unknown request."""
        request = self._requests.get(request_id)
        return list(request.block_ids) if request else []

    def update(self, step: Any) -> None:
        """Take in one SchedulerOutput, before the model runs it."""
        if getattr(step, "kv_cache_block_copies", None):
            raise OpenBlockError(
                "the scheduler copies parts of blocks (prefix_match_unit finer than a block), "
                "which compressed pages do not allow"
            )
        # Finished before new: an aborted request may come back under its old id in one step.
        for request_id in step.finished_req_ids:
            self._forget(request_id)
        for request_id in step.preempted_req_ids or ():
            self._forget(request_id)
        for request in self._requests.values():
            self._release_sealed(request, request.computed)

        starts: dict[str, int] = {}
        for new in step.scheduled_new_reqs:
            # A known id: a session that got more input; its blocks so far stay where they are.
            request = self._requests.setdefault(new.req_id, _Request([]))
            self._replace_blocks(request, self._pages(new.block_ids))
            starts[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for request_id, new_blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self._forget(request_id)
                self._requests[request_id] = _Request(self._pages(new_blocks))
            elif request_id not in self._requests:
                raise OpenBlockError(f"request {request_id} is scheduled but was never announced")
            elif new_blocks is not None:
                self._requests[request_id].block_ids.extend(self._pages(new_blocks))
            starts[request_id] = computed

        # Free everything that can be freed before the first slot is taken.
        for request_id, start in starts.items():
            self._release_sealed(self._requests[request_id], start)
        for request_id, start in starts.items():
            count = step.num_scheduled_tokens.get(request_id, 0)
            self._take(request_id, self._requests[request_id], start, count)
        self.peak = max(self.peak, self.in_use)

    def _pages(self, block_ids: Any) -> list[int]:
        """Our group's of a tuple of lists of the scheduler's block ids, page by page; a new list:
        the scheduler's own may grow later."""
        per_block = self._pages_per_block
        ours = block_ids[self._group]
        return [block * per_block + page for block in ours for page in range(per_block)]

    def _take(self, request_id: str, request: _Request, start: int, count: int) -> None:
        """Give a slot to each block that [start, start + count) touches and does not fill."""
        end = start + count
        request.computed = end
        if count == 0:
            return
        head, tail = start // self._block, (end - 1) // self._block
        if tail >= len(request.block_ids):
            raise OpenBlockError(
                f"request {request_id} computes up to token {end} with only "
                f"{len(request.block_ids)} blocks"
            )
        known, request.sealed = max(request.sealed, head), max(request.sealed, end // self._block)
        self.sealed_blocks += max(0, request.sealed - known)
        for index in {head, tail}:
            first = index * self._block
            if index in request.slots or (start <= first and first + self._block <= end):
                continue
            if index == head and start % self._block:
                # Its first tokens were never written raw here: reading them would be garbage.
                raise OpenBlockError(
                    f"request {request_id} continues inside block {index} at token {start}, "
                    "whose earlier tokens are not open in this process"
                )
            request.slots[index] = self._assign(request.block_ids[index])

    def _assign(self, block_id: int) -> int:
        if self._map[block_id] >= 0:
            raise OpenBlockError(f"block {block_id} is already open for another request")
        if not self._free:
            raise OpenBlocksExhausted(
                f"all {self.num_open} open blocks are in use. The pool is sized from max_num_seqs "
                "(--max-num-seqs): raise it"
            )
        slot = self._free.pop()
        self._map[block_id] = slot
        self._changed.add(block_id)
        return slot

    def _release(self, request: _Request, indices: Iterable[int]) -> None:
        for index in list(indices):
            self._free.append(request.slots.pop(index))
            self._map[request.block_ids[index]] = -1
            self._changed.add(request.block_ids[index])

    def _release_sealed(self, request: _Request, computed: int) -> None:
        """Free the slots of blocks that are full for good, given ``computed`` tokens."""
        settled = (computed - self._lookback) // self._block
        if request.slots:
            self._release(request, [index for index in request.slots if index < settled])

    def _replace_blocks(self, request: _Request, block_ids: list[int]) -> None:
        known = request.block_ids
        self._release(
            request,
            [i for i in request.slots if i >= len(block_ids) or block_ids[i] != known[i]],
        )
        request.block_ids = block_ids

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._release(request, request.slots)
