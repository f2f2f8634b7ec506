"""KAKEYA_VERIFY=1: a worker that checks what it stores and what it reads, and stops at a mismatch.

What is checked, in every layer of every step:

* *Pages that are read.* A checksum of each page is taken when it was sealed; before attention every
  page that the step will read must still have it, and must have been sealed since its block was
  last begun. So a page that was overwritten, given to another sequence or never written is found
  by the first step that would have used it.
* *Pages that are sealed*, one a step: the same rows through ``kakeya_seal`` must give the same
  bytes. On a GPU that compares the kernels with the codec.
* *Attention outputs*, one token and KV head a step, drawn at random: computed once more in float64
  from opened pages, open blocks and the step's own rows.

The first mismatch raises :class:`VerifyError` with layer, block and request, which ends the engine:
what it would have answered is not to be trusted. All pages of a step's sequences are read once more
and the device is waited for in every layer, which is why it is a mode for finding faults
(docs/trust.md has what it costs) and why a GPU must run without CUDA graphs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from kakeya_vllm import lib

BLOCK = lib.BLOCK_TOKENS
# Relative L2 error of an output row, over the norm of the values that it averages. Kernels are
# tested to 2e-3 and rounding to bf16 is as much; FlashAttention rounds probabilities to bf16, and
# scores of keys with large offsets lose a few more bits. Wrong data gives errors near 1.
BOUND = 0.03
# Blocks whose pages are gathered at a time, which bounds the copy.
_CHUNK = 1024


class VerifyError(RuntimeError):
    """A page or an output is not what it must be."""


def checksums(pages: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """int64 [count, heads] of pages uint8 [count, heads, P], P a multiple of 8.

    The sum of the page's 64-bit words times odd random factors int64 [P / 8], modulo 2^64: odd
    factors are invertible, so no change of a single word goes unseen, and any other one does with a
    chance near 2^-63.
    """
    return (pages.contiguous().view(torch.int64) * factors).sum(-1)


def odd_factors(page_bytes: int, device: torch.device) -> torch.Tensor:
    """What :func:`checksums` multiplies by, int64 [page_bytes / 8]. The same in every process."""
    generator = torch.Generator().manual_seed(0x6B616B65)
    words = torch.randint(-(2**62), 2**62, (page_bytes // 8,), generator=generator)
    return (2 * words + 1).to(device)


@dataclass
class _Row:
    """One sequence of a step: its rows of q, tokens before the step, blocks, and pages it reads."""

    first: int
    count: int
    history: int
    blocks: list[int]
    pages: int

    @property
    def length(self) -> int:
        return self.history + self.count


@dataclass
class _Layer:
    """One layer's checksums, by block."""

    sums: torch.Tensor  # int64 [blocks, heads], on the device
    factors: torch.Tensor
    sealed: set[int] = field(default_factory=set)  # blocks whose page may be read


class Verifier:
    """The checks of one worker. Made by Runtime; layers call :meth:`written` and :meth:`attended`.

    ``max_query``: on a GPU, how many tokens of a sequence count as decoding; None on the CPU.
    """

    def __init__(
        self, codec: Any, *, head_dim: int, sealed_prefill: bool, max_query: int | None, seed: int
    ) -> None:
        self.codec = codec
        self.head_dim = head_dim
        self.sealed_prefill = sealed_prefill
        self.max_query = max_query
        self.open_blocks: Any = None
        self.live = False  # whether a scheduled step is running, not a dummy run
        self.worst = 0.0  # largest relative error of an output so far
        self.counts = {"pages": 0, "seals": 0, "outputs": 0}  # checked so far
        self._random = random.Random(seed)
        self._layers: dict[int, _Layer] = {}
        self._step: tuple[Any, list[_Row]] | None = None

    # ---- a layer's step ---------------------------------------------------------------------

    def written(
        self,
        layer: int,
        first_head: int,
        step: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        open_pool: torch.Tensor,
    ) -> None:
        """K and V of the step were written: take sums of what it sealed, check what it will read.

        key, value [rows, KV heads, D]; kv_cache uint8 [B, H, 1, P]; open_pool [slots, 2, H, 128,
        D]. Raises VerifyError.
        """
        if not self.live:
            return
        state = self._layer(layer, kv_cache)
        rows = self._rows(step)
        sealed: list[int] = []
        filled: list[tuple[_Row, int]] = []
        for row in rows:
            first, last = row.history // BLOCK, row.length // BLOCK
            sealed += row.blocks[first:last]
            filled += [(row, index) for index in range(first, last)]
            # What it began or continued: another sequence's page may have been there.
            state.sealed.difference_update(row.blocks[last : -(-row.length // BLOCK)])
        for ids in _chunks(sealed, kv_cache.device):
            state.sums[ids] = checksums(kv_cache[ids].squeeze(2), state.factors)
        state.sealed.update(sealed)
        if filled:
            row, index = self._random.choice(filled)
            head = self._random.randrange(key.shape[1])
            self._check_seal(
                layer, first_head, head, row, index, step, key, value, kv_cache, open_pool
            )
        self._check_pages(layer, state, rows, kv_cache)

    def attended(
        self,
        layer: int,
        first_head: int,
        step: Any,
        scale: float,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        open_pool: torch.Tensor,
        output: torch.Tensor,
        *,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """The step's outputs are there: compute one token and KV head of them again.

        query, output [rows, heads, D]; sinks [heads]; the rest as :meth:`written`. Raises
        VerifyError.
        """
        rows = self._rows(step) if self.live else []
        if not rows:
            return
        row = self._random.choice(rows)
        token = self._random.randrange(row.count)
        head = self._random.randrange(key.shape[1])
        k, v = self._sequence(
            layer, first_head, head, row, token, step, key, value, kv_cache, open_pool
        )
        group = query.shape[1] // key.shape[1]
        heads = slice(head * group, (head + 1) * group)
        q = query[row.first + token, heads].double().cpu()
        scores = q @ k.T * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if sinks is not None:  # one more key, whose value is nothing
            scores = torch.cat([scores, sinks[heads, None].double().cpu()], dim=-1)
        weights = torch.softmax(scores, dim=-1)[:, : len(v)]
        want = weights @ v
        found = output[row.first + token, heads].double().cpu()
        # Not over the output's own norm: values may cancel.
        size = (weights @ v.square().sum(-1, keepdim=True)).sqrt()
        error = ((found - want).norm(dim=-1, keepdim=True) / size.clamp_min(1e-30)).max().item()
        self.counts["outputs"] += 1
        self.worst = max(self.worst, error)
        if not error <= BOUND:  # NaN included
            position = row.history + token
            raise VerifyError(
                f"KAKEYA_VERIFY: layer {layer}, KV head {first_head + head}, "
                f"{self._name(row, position // BLOCK)}: attention at position {position} is "
                f"{error:.3g} from its reference (relative L2; valid: {BOUND})"
            )

    # ---- pages ------------------------------------------------------------------------------

    def _check_pages(
        self, layer: int, state: _Layer, rows: list[_Row], kv_cache: torch.Tensor
    ) -> None:
        where: dict[int, tuple[_Row, int]] = {}
        for row in rows:
            for index, block in enumerate(row.blocks[: row.pages]):
                where.setdefault(block, (row, index))
        for block, (row, index) in where.items():
            if block not in state.sealed:
                raise VerifyError(
                    f"KAKEYA_VERIFY: layer {layer}, {self._name(row, index)}: the page that is "
                    "read was not sealed since its block was last begun"
                )
        for ids in _chunks(list(where), kv_cache.device):
            wrong = checksums(kv_cache[ids].squeeze(2), state.factors) != state.sums[ids]
            if bool(wrong.any()):
                at, head = wrong.nonzero()[0].tolist()
                row, index = where[int(ids[at])]
                raise VerifyError(
                    f"KAKEYA_VERIFY: layer {layer}, {self._name(row, index)}: the page of this "
                    f"worker's KV head {head} is not the one that was sealed"
                )
        self.counts["pages"] += len(where) * kv_cache.shape[1]

    def _check_seal(
        self,
        layer: int,
        first_head: int,
        head: int,
        row: _Row,
        index: int,
        step: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        open_pool: torch.Tensor,
    ) -> None:
        """The page of a block that this step filled, against the codec's page of the same rows."""
        first = index * BLOCK
        k, v = self._raw(head, row, first, first + BLOCK, step, key, value, open_pool)
        found = kv_cache[row.blocks[index], head, 0].cpu()
        page = torch.empty_like(found)
        args = lib.SealArgs(
            layer=layer,
            first_head=first_head + head,
            num_heads=1,
            dtype=lib.DTYPE_F32,
            block_index=index,
            k=k.data_ptr(),
            v=v.data_ptr(),
            k_token_stride=k.stride(0),
            k_head_stride=0,
            v_token_stride=v.stride(0),
            v_head_stride=0,
            pages=page.data_ptr(),
            page_head_stride=page.numel(),
        )
        self.codec.seal(args)
        self.counts["seals"] += 1
        differs = (found != page).nonzero()
        if len(differs):
            raise VerifyError(
                f"KAKEYA_VERIFY: layer {layer}, KV head {first_head + head}, "
                f"{self._name(row, index)}: {len(differs)} bytes of the sealed page differ from "
                f"the codec's, the first at {int(differs[0])}"
            )

    # ---- rows -------------------------------------------------------------------------------

    def _sequence(
        self,
        layer: int,
        first_head: int,
        head: int,
        row: _Row,
        token: int,
        step: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        open_pool: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V float64 [tokens, D] that a token of a sequence attends to, its own last."""
        position = row.history + token
        pages = self._pages_of(row, position)
        keys = torch.empty(pages, BLOCK, self.head_dim)
        values = torch.empty_like(keys)
        bytes_ = kv_cache[_ids(row.blocks[:pages], kv_cache.device), head, 0].cpu()
        for index in range(pages):
            self.codec.open(
                layer,
                first_head + head,
                bytes_[index].data_ptr(),
                bytes_.shape[1],
                keys[index].data_ptr(),
                values[index].data_ptr(),
                BLOCK * self.head_dim,
            )
        k, v = self._raw(head, row, pages * BLOCK, position + 1, step, key, value, open_pool)
        return (
            torch.cat([keys.reshape(-1, self.head_dim), k]).double(),
            torch.cat([values.reshape(-1, self.head_dim), v]).double(),
        )

    def _raw(
        self,
        head: int,
        row: _Row,
        begin: int,
        end: int,
        step: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        open_pool: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V float32 [end - begin, D] of positions that no page holds: from the open block
        before the step's tokens, from the step's tensors from there on."""
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        if begin < row.history:
            block = row.blocks[begin // BLOCK]
            slot = int(step.open_slot[block])
            if slot < 0:
                raise VerifyError(
                    f"KAKEYA_VERIFY: {self._name(row, begin // BLOCK)}: it is read raw and is not "
                    "open"
                )
            inside = slice(begin % BLOCK, begin % BLOCK + min(end, row.history) - begin)
            for stream, part in enumerate(parts):
                part.append(open_pool[slot, stream, head, inside].float().cpu())
        if end > row.history:
            here = slice(row.first + max(begin - row.history, 0), row.first + end - row.history)
            for tensor, part in zip((key, value), parts, strict=True):
                part.append(tensor[here, head].float().cpu())
        return torch.cat(parts[0]).contiguous(), torch.cat(parts[1]).contiguous()

    def _pages_of(self, row: _Row, position: int) -> int:
        """Blocks that a query at ``position`` reads through pages; the rest it reads raw."""
        decodes = self.max_query is not None and row.count <= self.max_query
        if decodes or self.sealed_prefill:
            return position // BLOCK
        return row.history // BLOCK

    def _rows(self, step: Any) -> list[_Row]:
        """The sequences of a step; worked out once for all layers."""
        if self._step is not None and self._step[0] is step:
            return self._step[1]
        starts = step.query_start.tolist()
        lens = step.seq_lens.tolist()
        longest = max((-(-length // BLOCK) for length in lens), default=0)
        table = step.block_table[:, :longest].tolist()
        rows = []
        for i, length in enumerate(lens):
            count = starts[i + 1] - starts[i]
            if count > 0:
                blocks = table[i][: -(-length // BLOCK)]
                row = _Row(starts[i], count, length - count, blocks, 0)
                row.pages = self._pages_of(row, length - 1)
                rows.append(row)
        self._step = step, rows
        return rows

    # ---- names ------------------------------------------------------------------------------

    def _name(self, row: _Row, index: int) -> str:
        """Block and request, for messages."""
        found = [
            request
            for request in (self.open_blocks.request_ids if self.open_blocks else [])
            if self.open_blocks.blocks_of(request)[: len(row.blocks)] == row.blocks
        ]
        whose = " or ".join(repr(request) for request in found) or "a request that is not followed"
        return f"block {row.blocks[index]} (block {index} of request {whose})"

    def _layer(self, layer: int, kv_cache: torch.Tensor) -> _Layer:
        state = self._layers.get(layer)
        if state is None:
            blocks, heads, _, page_bytes = kv_cache.shape
            device = kv_cache.device
            state = _Layer(
                torch.zeros(blocks, heads, dtype=torch.int64, device=device),
                odd_factors(page_bytes, device),
            )
            self._layers[layer] = state
        return state


def _ids(blocks: list[int], device: torch.device) -> torch.Tensor:
    """Block ids as an index tensor."""
    return torch.tensor(blocks, dtype=torch.int64, device=device)


def _chunks(blocks: list[int], device: torch.device) -> list[torch.Tensor]:
    """Block ids as index tensors of at most _CHUNK."""
    return [_ids(blocks[at : at + _CHUNK], device) for at in range(0, len(blocks), _CHUNK)]
