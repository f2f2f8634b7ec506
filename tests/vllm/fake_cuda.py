"""A device library in Python whose pages hold raw rows, so that attention through it is exact.

It reads the argument structures as the kernels do, from addresses, and does what kernels/params.cuh
says. What the plugin does around it (slots, plans, pieces of history) must then give exactly the
attention over all tokens.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from kakeya_vllm import lib

BLOCK = lib.BLOCK_TOKENS
ELEMENT = torch.bfloat16


def at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> torch.Tensor:
    """The tensor at an address, strides in elements."""
    if not all(shape):
        return torch.empty(shape, dtype=dtype)
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


def row(address: int, count: int, dtype: Any) -> torch.Tensor:
    return at(address, (count,), (1,), dtype)


class FakeCudaCodec:
    """Stands in for lib.CudaCodec."""

    def __init__(self, shape: dict[str, int], **limits: int) -> None:
        self.heads, self.dim = limits["num_kv_heads"], shape["head_dim"]
        self.group = shape["num_q_heads"] // shape["num_kv_heads"]
        self.limits = limits
        self.calls: list[str] = []
        self.max_tasks = limits["max_seqs"] + limits["max_tokens"] // BLOCK

    def buffers(self) -> lib.CudaBuffers:
        plan = 4 + 4 * self.max_tasks + self.limits["max_seqs"] + 1
        return lib.CudaBuffers(0, 0, plan, 1, 1)

    @property
    def page_bytes(self) -> int:
        return 2 * BLOCK * self.dim * ELEMENT.itemsize

    def require_options(self, options: lib.AttendOptions) -> None:
        self.calls.append("require_options")
        if not options.soft_cap >= 0:
            raise ValueError(f"soft_cap is {options.soft_cap}")

    def _pages(self, args: Any) -> torch.Tensor:
        """[blocks, heads, K and V, 128, D]"""
        block, head = args.page_block_stride // 2, args.page_head_stride // 2
        shape = (args.num_blocks, self.heads, 2, BLOCK, self.dim)
        return at(args.pages, shape, (block, head, BLOCK * self.dim, self.dim, 1), ELEMENT)

    def _open_blocks(self, args: Any) -> torch.Tensor:
        shape = (args.num_open, 2, self.heads, BLOCK, self.dim)
        strides = [1]
        for n in reversed(shape[1:]):
            strides.insert(0, strides[0] * n)
        return at(args.open_blocks, shape, tuple(strides), ELEMENT)

    def _tensor(self, args: Any, name: str, heads: int, rows: int) -> torch.Tensor:
        token, head = (getattr(args, f"{name}_{kind}_stride") for kind in ("token", "head"))
        return at(getattr(args, name), (rows, heads, self.dim), (token, head, 1), ELEMENT)

    def _sequences(self, args: Any) -> tuple[list[int], list[int], torch.Tensor]:
        starts = row(args.query_start, args.num_seqs + 1, torch.int32).tolist()
        lens = row(args.seq_lens, args.num_seqs, torch.int32).tolist()
        shape = (args.num_seqs, args.max_blocks_per_seq)
        table = at(args.block_table, shape, (args.block_table_stride, 1), torch.int32)
        return starts, lens, table

    def plan(self, args: lib.CudaPlanArgs) -> None:
        self.calls.append("plan")
        starts, lens, table = self._sequences(args)
        slots = row(args.open_slot, args.num_blocks, torch.int32)
        tasks = []
        for s, length in enumerate(lens):
            count = starts[s + 1] - starts[s]
            history = length - count
            if count <= 0:
                continue
            for index in range(history // BLOCK, length // BLOCK):
                block, before = int(table[s, index]), index * BLOCK - history
                if before >= 0:
                    tasks += [block, index, starts[s] + before, -1]
                else:
                    tasks += [block, index, -1, int(slots[block])]
        assert len(tasks) <= 4 * self.max_tasks
        plan = row(args.plan, self.buffers().plan_len, torch.int32)
        plan.fill_(-7)
        plan[0] = len(tasks) // 4
        plan[4 : 4 + len(tasks)] = torch.tensor(tasks, dtype=torch.int32)

    def append(self, args: lib.CudaWriteArgs) -> None:
        self.calls.append("append")
        k, v = (self._tensor(args, name, self.heads, args.num_tokens) for name in "kv")
        slots = row(args.open_slot, args.num_blocks, torch.int32)
        pool = self._open_blocks(args)
        for token, place in enumerate(
            row(args.slot_mapping, args.num_tokens, torch.int64).tolist()
        ):
            slot = int(slots[place // BLOCK]) if place >= 0 else -1
            if slot >= 0:
                pool[slot, 0, :, place % BLOCK] = k[token]
                pool[slot, 1, :, place % BLOCK] = v[token]

    def seal(self, args: lib.CudaWriteArgs) -> None:
        self.calls.append("seal")
        plan = row(args.plan, self.buffers().plan_len, torch.int32).tolist()
        k, v = (self._tensor(args, name, self.heads, args.num_tokens) for name in "kv")
        pages, pool = self._pages(args), self._open_blocks(args)
        for i in range(plan[0]):
            block, _, first, slot = plan[4 + 4 * i : 8 + 4 * i]
            if first >= 0:
                pages[block, :, 0] = k[first : first + BLOCK].transpose(0, 1)
                pages[block, :, 1] = v[first : first + BLOCK].transpose(0, 1)
            else:
                assert slot >= 0, "a block was filled that was not open"
                pages[block] = pool[slot].transpose(0, 1)

    def attend(self, args: lib.CudaAttendArgs, options: lib.AttendOptions | None = None) -> None:
        self.calls.append("attend")
        starts, lens, table = self._sequences(args)
        slots = row(args.open_slot, args.num_blocks, torch.int32)
        pages, pool = self._pages(args), self._open_blocks(args)
        heads = self.heads * self.group
        soft_cap, sinks = 0.0, None
        if options is not None:
            soft_cap = options.soft_cap
            sinks = row(options.sinks, heads, torch.float32) if options.sinks else None
        q, out = (self._tensor(args, name, heads, args.num_tokens) for name in ("q", "out"))
        for s, length in enumerate(lens):
            count = starts[s + 1] - starts[s]
            if not 0 < count <= self.limits["max_query"]:
                continue
            history = length - count
            for own in range(history // BLOCK, (length - 1) // BLOCK + 1):
                # The queries that stand in block `own`: pages before it, itself raw.
                first, end = max(history, own * BLOCK), min(length, (own + 1) * BLOCK)
                blocks = table[s, : own + 1].tolist()
                assert slots[blocks[own]] >= 0, "an open block without a slot"
                rows = [pages[block].transpose(0, 1) for block in blocks[:own]]
                rows.append(pool[int(slots[blocks[own]])])
                kv = torch.cat(rows, dim=2)[:, :, :end]  # [2, heads, tokens, D]
                here = slice(starts[s] + first - history, starts[s] + end - history)
                rest = args.scale, True, soft_cap, sinks
                out[here] = attention(q[here], *kv.transpose(1, 2), *rest)[0]

    def open(self, args: lib.CudaOpenArgs) -> None:
        self.calls.append("open")
        pages = self._pages(args)
        k, v = (self._tensor(args, name, self.heads, BLOCK * args.count) for name in "kv")
        for i, block in enumerate(row(args.blocks, args.count, torch.int32).tolist()):
            k[BLOCK * i : BLOCK * (i + 1)] = pages[block, :, 0].transpose(0, 1)
            v[BLOCK * i : BLOCK * (i + 1)] = pages[block, :, 1].transpose(0, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, heads, D]; k, v [m, KV heads, D]; the queries are the last of the keys if causal.
    Returns out and log-sum-exp [heads, n], the sinks in both."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * scale
    n, m = scores.shape[1:]
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if causal:
        mask = torch.arange(m) > torch.arange(m - n, m)[:, None]
        scores = scores.masked_fill(mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], dim=-1)
    out = torch.einsum("hnm,mhd->nhd", scores.softmax(-1)[..., :m], v)
    return out.to(q.dtype), scores.logsumexp(-1)


def flash_attention(**a: Any) -> Any:
    """FlashAttention's variable-length call, in torch."""
    q, k, v = a["q"], a["k"], a["v"]
    out = torch.empty_like(q) if a["out"] is None else a["out"]
    qs, ks = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
    assert (qs[-1], ks[-1]) == (len(q), len(k)), "rows outside of any sequence"
    assert max(b - a for a, b in itertools.pairwise(qs)) == a["max_seqlen_q"]
    sums = []
    for i in range(len(qs) - 1):
        rows, keys = slice(qs[i], qs[i + 1]), slice(ks[i], ks[i + 1])
        rest = a["softmax_scale"], a["causal"], a["softcap"]
        result, lse = attention(q[rows], k[keys], v[keys], *rest)
        out[rows] = result
        sums.append(lse)
    return (out, torch.cat(sums, 1)) if a["return_softmax_lse"] else out


def merge_attention(
    out: torch.Tensor,
    a: torch.Tensor,
    a_lse: torch.Tensor,
    b: torch.Tensor,
    b_lse: torch.Tensor,
    out_lse: torch.Tensor | None,
) -> None:
    total = torch.logaddexp(a_lse, b_lse)
    weigh = lambda x, lse: x.float() * (lse - total).exp().transpose(0, 1)[..., None]  # noqa: E731
    out.copy_((weigh(a, a_lse) + weigh(b, b_lse)).to(out.dtype))
    if out_lse is not None:
        out_lse.copy_(total)
