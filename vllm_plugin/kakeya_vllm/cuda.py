"""One worker on a CUDA device: what its layers share there, and one layer's step.

A step is launches on the current stream and nothing else: no allocation that lives on, no wait for
the device, and every address that a captured graph sees stays where it is. The order of the stream
also orders steps that the scheduler has queued ahead.

Block 0 is vLLM's null block: padding and the dummy runs of profiling and capture read and write it,
no request ever does. It is open for ever, in a slot of its own behind the pool's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from kakeya_vllm import lib
from kakeya_vllm.allocation import allocating

NULL_BLOCK = 0
# Query tokens of a sequence that the attention kernel takes; drafts to verify must fit.
MAX_QUERY = 8
MIN_CAPABILITY = (8, 0)
# Tokens of history that prefill opens at a time: bounds the dense workspace of a worker.
HISTORY_TOKENS = 16384
# Blocks of the map before the KV cache exists. vLLM captures graphs over a small cache then, to
# learn what they cost.
_EARLY_BLOCKS = 1 << 16
# Steps between two looks at the kernels' status word.
_STATUS_STEPS = 16
_NON_FINITE = 1  # bit of the status word

DTYPES = {torch.bfloat16: lib.DTYPE_BF16, torch.float16: lib.DTYPE_F16}


def max_query(vllm_config: Any) -> int:
    """Tokens of a sequence in a step that count as decoding: one, and the drafts to verify."""
    speculative = vllm_config.speculative_config
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    return min(MAX_QUERY, 1 + drafts)


def batch_invariant() -> bool:
    """VLLM_BATCH_INVARIANT: vLLM promises that a request's tokens depend on no other request."""
    return bool(envs.VLLM_BATCH_INVARIANT)


def to_device(values: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor, copied without waiting. torch keeps the pinned source until it was read."""
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class SlotMap:
    """``open_slot`` on the device: int32 by block id, following the map of OpenBlocks."""

    def __init__(self, num_blocks: int, scratch: int, device: torch.device, fill: int = -1) -> None:
        self.tensor = torch.full((num_blocks,), fill, dtype=torch.int32, device=device)
        self.tensor[NULL_BLOCK] = scratch

    def apply(self, blocks: list[int], slots: list[int]) -> None:
        """Set the slots of some blocks, on the current stream, without waiting."""
        if not blocks:
            return
        where = to_device(blocks, torch.int64, self.tensor.device)
        what = to_device(slots, torch.int32, self.tensor.device)
        self.tensor.index_copy_(0, where, what)


class CudaWorker:
    """What the layers of one worker share on its device. Made before vLLM profiles memory."""

    def __init__(
        self,
        vllm_config: Any,
        codec: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        num_kv_heads: int,
        head_size: int,
        num_open: int,
        make: Any = lib.CudaCodec,
    ) -> None:
        self.device = device
        self.max_query = max_query(vllm_config)
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        # Graphs pad a batch to the next captured size.
        self.max_seqs = max(scheduler.max_num_seqs, captured)
        self.max_tokens = max(
            scheduler.max_num_batched_tokens, self.max_seqs * self.max_query, captured
        )
        self.codec = make(
            codec,
            device=device.index or 0,
            max_seqs=self.max_seqs,
            max_tokens=self.max_tokens,
            max_query=self.max_query,
            num_kv_heads=num_kv_heads,
            batch_invariant=batch_invariant(),
        )
        sizes = self.codec.buffers()
        self.plan_len = sizes.plan_len
        with allocating(
            "the workspace of the attention kernel",
            4 * sizes.workspace_len,
            "lower max_num_seqs (--max-num-seqs)",
        ):
            self.workspace = torch.empty(sizes.workspace_len, dtype=torch.float32, device=device)
        self.counters = torch.zeros(sizes.counters_len, dtype=torch.int32, device=device)
        self.status = torch.zeros(1, dtype=torch.int32, device=device)
        block = lib.BLOCK_TOKENS
        # One more: drafts may reach past the longest sequence.
        self.max_blocks = -(-vllm_config.model_config.max_model_len // block) + 1
        rows = min(self.max_blocks * block, HISTORY_TOKENS)
        with allocating(
            "the workspace of prefill",
            2 * rows * num_kv_heads * head_size * dtype.itemsize,
            f"lower max_model_len (--max-model-len) below {HISTORY_TOKENS}, or leave the GPU more",
        ):
            self.history = torch.empty(2, rows, num_kv_heads, head_size, dtype=dtype, device=device)
        self.scratch = num_open
        self.slots = SlotMap(_EARLY_BLOCKS, self.scratch, device, fill=self.scratch)
        # Whether a scheduled step is running. Dummy runs build metadata as well, over block tables
        # that may be left from real steps: what they fill must not be sealed there.
        self.live = False
        self._steps = 0
        self._seen: tuple[torch.Tensor, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device beside the open blocks."""
        return self.workspace.nbytes + self.counters.nbytes + self.history.nbytes

    def bind(self, num_blocks: int) -> None:
        """The KV cache has ``num_blocks`` blocks; no graph of before is used any more."""
        self.slots = SlotMap(num_blocks, self.scratch, self.device)

    def before_step(self, open_blocks: Any) -> None:
        """Bring the map up to date, and look for refusals of earlier steps."""
        if self._steps == 0:
            self.status.zero_()  # what dummy runs met is nobody's
        self.live = True
        self.slots.apply(*open_blocks.take_changes())
        if self._steps % _STATUS_STEPS == 0:
            self._check_status()
        self._steps += 1

    def _check_status(self) -> None:
        # One copy at a time is under way, and it is read only when it has arrived.
        if self._seen is not None:
            host, event = self._seen
            if event is not None and not event.query():
                return
            if int(host[0]) & _NON_FINITE:
                raise RuntimeError(
                    "a layer produced keys or values that are not finite (or above 2^24), which "
                    "cannot be stored in a page"
                )
            if int(host[0]):
                raise RuntimeError("a block was filled that was not open: please report this")
        cuda = self.device.type == "cuda"
        host = torch.empty(1, dtype=torch.int32, pin_memory=cuda)
        host.copy_(self.status, non_blocking=True)
        event = torch.cuda.Event() if cuda else None
        if event is not None:
            event.record()
        self._seen = host, event


@dataclass
class Prefill:
    """Sequences of a step with more than max_query tokens: rows [first, last) of the batch.

    Without history, any number of neighbours; with history, one. ``starts`` are the rows' starts in
    the step's tokens from ``begin`` on, int32 on the device.
    """

    begin: int
    end: int
    longest: int
    starts: torch.Tensor
    row: int = 0
    history: int = 0
    # For each piece of history: its first token, its tokens, and [0, tokens] on the device.
    pieces: tuple[tuple[int, int, torch.Tensor], ...] = ()


@dataclass
class KakeyaCudaMetadata(AttentionMetadata):
    """One step, as the kernels take it. Tensors are on the device, all of them vLLM's or ours for
    good, so a captured graph finds them again."""

    num_tokens: int
    num_seqs: int
    query_start: torch.Tensor  # int32 [seqs + 1]
    seq_lens: torch.Tensor  # int32 [seqs]
    block_table: torch.Tensor  # int32 [seqs, blocks]
    slot_mapping: torch.Tensor  # int64 [tokens]
    plan: torch.Tensor  # int32
    open_slot: torch.Tensor  # int32 [blocks]
    decodes: bool  # whether any sequence is for the attention kernel
    prefills: tuple[Prefill, ...]


class Planner:
    """Turns vLLM's metadata of a step into ours and launches the plan of the step."""

    def __init__(self, worker: CudaWorker) -> None:
        self.worker = worker
        self.plan = torch.zeros(worker.plan_len, dtype=torch.int32, device=worker.device)
        self._args = lib.CudaPlanArgs(struct_size=ctypes.sizeof(lib.CudaPlanArgs))
        self._args.plan = self.plan.data_ptr()
        self._null_table = torch.full(
            (worker.max_seqs, worker.max_blocks),
            NULL_BLOCK,
            dtype=torch.int32,
            device=worker.device,
        )

    def build(self, common: CommonAttentionMetadata) -> KakeyaCudaMetadata:
        worker = self.worker
        seq_lens, table = common.seq_lens, common.block_table_tensor
        query_start, slot_mapping = common.query_start_loc, common.slot_mapping
        for name, tensor, dtype in (
            ("query_start_loc", query_start, torch.int32),
            ("seq_lens", seq_lens, torch.int32),
            ("block_table_tensor", table, torch.int32),
            ("slot_mapping", slot_mapping, torch.int64),
        ):
            # A converted copy would be right now and stale when a graph is replayed.
            if tensor.dtype is not dtype or tensor.stride(-1) != 1:
                raise ValueError(f"{name} must be contiguous {dtype}, not {tensor.dtype}")
        num_seqs = seq_lens.shape[0]
        decodes, prefills = True, ()
        if common.max_query_len > worker.max_query:
            decodes, prefills = self._split(common, num_seqs)
        open_slot = worker.slots.tensor
        args = self._args
        args.num_seqs = num_seqs
        args.num_blocks = open_slot.shape[0]
        args.query_start = query_start.data_ptr()
        args.seq_lens = seq_lens.data_ptr()
        planned = table if worker.live else self._null_table
        args.max_blocks_per_seq = planned.shape[1]
        args.block_table = planned.data_ptr()
        args.block_table_stride = planned.stride(0)
        args.open_slot = open_slot.data_ptr()
        args.stream = current_stream(worker.device)
        worker.codec.plan(args)
        return KakeyaCudaMetadata(
            num_tokens=common.num_actual_tokens,
            num_seqs=num_seqs,
            query_start=query_start,
            seq_lens=seq_lens,
            block_table=table,
            slot_mapping=slot_mapping[: common.num_actual_tokens],
            plan=self.plan,
            open_slot=open_slot,
            decodes=decodes,
            prefills=prefills,
        )

    def _split(
        self, common: CommonAttentionMetadata, num_seqs: int
    ) -> tuple[bool, tuple[Prefill, ...]]:
        """Which sequences are prefill, from what the host knows exactly of them.

        Their lengths are exact on the host even where those of decoding sequences are not yet: only
        accepted drafts are ever in doubt.
        """
        limit = self.worker.max_query
        starts = common.query_start_loc_cpu.tolist()
        lens = common.seq_lens_cpu_upper_bound
        if lens is None:
            raise ValueError("KAKEYA needs seq_lens_cpu_upper_bound from the model runner")
        lens = lens.tolist()
        decodes = False
        found: list[tuple[int, int, int]] = []  # first row, last row + 1, history
        for row in range(num_seqs):
            count = starts[row + 1] - starts[row]
            if count <= limit:
                decodes = decodes or count > 0
                continue
            history = max(0, lens[row] - count)
            if not history and found and found[-1][1:] == (row, 0):
                found[-1] = (found[-1][0], row + 1, 0)
            else:
                found.append((row, row + 1, history))
        return decodes, self._prefills(found, starts)

    def _prefills(
        self, found: list[tuple[int, int, int]], starts: list[int]
    ) -> tuple[Prefill, ...]:
        # All small arrays of the step travel in one copy.
        flat: list[int] = []
        window = self.worker.history.shape[1]
        for first, last, history in found:
            flat += [starts[row] - starts[first] for row in range(first, last + 1)]
            for begin in range(0, history, window):
                flat += [0, min(window, history - begin)]
        device = to_device(flat, torch.int32, self.worker.device)
        at = 0

        def take(count: int) -> torch.Tensor:
            nonlocal at
            at += count
            return device[at - count : at]

        prefills = []
        for first, last, history in found:
            counts = [starts[row + 1] - starts[row] for row in range(first, last)]
            cumulative = take(last - first + 1)
            pieces = tuple(
                (begin, min(window, history - begin), take(2))
                for begin in range(0, history, window)
            )
            prefills.append(
                Prefill(
                    starts[first], starts[last], max(counts), cumulative, first, history, pieces
                )
            )
        return tuple(prefills)


class CudaLayer:
    """One layer's step: write, then attend."""

    def __init__(
        self,
        worker: CudaWorker,
        open_pool: torch.Tensor,
        layer: int,
        first_head: int,
        scale: float,
        *,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """``soft_cap``: of scores, 0 for none; ``sinks``: float32 [query heads], on the device."""
        self.worker = worker
        self.pool = open_pool
        self.scale = scale
        self.soft_cap = soft_cap
        self.sinks = sinks
        self._options = attend_options(soft_cap, sinks)
        if self._options is not None:
            worker.codec.require_options(self._options)
        self._write = lib.CudaWriteArgs(struct_size=ctypes.sizeof(lib.CudaWriteArgs))
        self._attend = lib.CudaAttendArgs(struct_size=ctypes.sizeof(lib.CudaAttendArgs))
        self._open = lib.CudaOpenArgs(struct_size=ctypes.sizeof(lib.CudaOpenArgs))
        for args in (self._write, self._attend, self._open):
            args.layer = layer
            args.first_head = first_head
            args.dtype = DTYPES[open_pool.dtype]
        for args in (self._write, self._attend):
            args.num_open = open_pool.shape[0]
            args.open_blocks = open_pool.data_ptr()
        self._write.status = worker.status.data_ptr()
        self._attend.scale = scale
        self._attend.workspace = worker.workspace.data_ptr()
        self._attend.counters = worker.counters.data_ptr()
        keys, values = worker.history
        self._open.k, self._open.v = keys.data_ptr(), values.data_ptr()
        self._open.k_token_stride, self._open.k_head_stride = keys.stride()[:2]
        self._open.v_token_stride, self._open.v_head_stride = values.stride()[:2]

    def read(
        self,
        step: KakeyaCudaMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attention of all sequences of the step, after :meth:`write`.

        query, output [rows, heads, D]; key, value [rows, KV heads, D]; kv_cache [B, H, 1, P]; all
        contiguous in D. Rows of padding are left as they are.
        """
        if step.decodes:
            self.attend(step, query, kv_cache, output)
        for prefill in step.prefills:
            rows = slice(prefill.begin, prefill.end)
            if prefill.history:
                self._continue(
                    step, prefill, query[rows], key[rows], value[rows], kv_cache, output[rows]
                )
            else:
                result = self._flash(
                    query[rows],
                    key[rows],
                    value[rows],
                    prefill.starts,
                    prefill.starts,
                    prefill.longest,
                    prefill.longest,
                    causal=True,
                    out=output[rows],
                    want_lse=self.sinks is not None,
                )
                if self.sinks is not None:
                    self._add_sinks(output[rows], result[1])

    def write(
        self,
        step: KakeyaCudaMetadata,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """K and V of the step into open blocks, and the blocks that it fills into pages."""
        args = self._write
        args.num_tokens = step.num_tokens
        args.num_seqs = step.num_seqs
        args.num_blocks = kv_cache.shape[0]
        args.k = key.data_ptr()
        args.v = value.data_ptr()
        args.k_token_stride, args.k_head_stride = key.stride()[:2]
        args.v_token_stride, args.v_head_stride = value.stride()[:2]
        args.slot_mapping = step.slot_mapping.data_ptr()
        args.open_slot = step.open_slot.data_ptr()
        args.plan = step.plan.data_ptr()
        args.pages = kv_cache.data_ptr()
        args.page_block_stride, args.page_head_stride = kv_cache.stride()[:2]
        args.stream = current_stream(self.worker.device)
        self.worker.codec.append(args)
        self.worker.codec.seal(args)

    def attend(
        self,
        step: KakeyaCudaMetadata,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attention of the sequences that decode."""
        args = self._attend
        args.num_seqs = step.num_seqs
        args.num_tokens = step.num_tokens
        args.num_blocks = kv_cache.shape[0]
        args.max_blocks_per_seq = step.block_table.shape[1]
        args.q = query.data_ptr()
        args.q_token_stride, args.q_head_stride = query.stride()[:2]
        args.out = output.data_ptr()
        args.out_token_stride, args.out_head_stride = output.stride()[:2]
        args.query_start = step.query_start.data_ptr()
        args.seq_lens = step.seq_lens.data_ptr()
        args.block_table = step.block_table.data_ptr()
        args.block_table_stride = step.block_table.stride(0)
        args.pages = kv_cache.data_ptr()
        args.page_block_stride, args.page_head_stride = kv_cache.stride()[:2]
        args.open_slot = step.open_slot.data_ptr()
        args.plan = step.plan.data_ptr()
        args.stream = current_stream(self.worker.device)
        self.worker.codec.attend(args, self._options)

    def _add_sinks(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Give the sinks their share of each row's softmax. output [rows, heads, D]; lse, of the
        scores without sinks, [heads, rows].

        For all prompts in one way, rather than by FlashAttention's own parameter, which counts a
        sink in every piece of a history.
        """
        output.mul_(torch.sigmoid(lse.transpose(0, 1) - self.sinks)[..., None])

    def _continue(
        self,
        step: KakeyaCudaMetadata,
        prefill: Prefill,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Prefill with history: the new tokens among themselves, then the history piece by piece,
        opened into the dense workspace; results are combined by their log-sum-exp."""
        starts, count = prefill.starts, prefill.longest
        part, lse = self._flash(
            query, key, value, starts, starts, count, count, causal=True, want_lse=True
        )
        for index, (begin, tokens, cumulative) in enumerate(prefill.pieces):
            keys, values = self._open_history(step, prefill, begin, tokens, kv_cache)
            piece, piece_lse = self._flash(
                query, keys, values, starts, cumulative, count, tokens, causal=False, want_lse=True
            )
            last = index + 1 == len(prefill.pieces)
            merged = output if last else torch.empty_like(part)
            merged_lse = None if last and self.sinks is None else torch.empty_like(lse)
            merge_attention(merged, piece, piece_lse, part, lse, merged_lse)
            part, lse = merged, merged_lse
        if self.sinks is not None:
            self._add_sinks(output, lse)

    def _open_history(
        self,
        step: KakeyaCudaMetadata,
        prefill: Prefill,
        begin: int,
        tokens: int,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [begin, begin + tokens) of a sequence as dense K and V [tokens, KV heads, D].

        The step's own tokens may already be in the last, open block: it is read up to the history's
        end only.
        """
        block = lib.BLOCK_TOKENS
        blocks = step.block_table[prefill.row, begin // block :]
        full, rest = divmod(tokens, block)
        args = self._open
        args.count = full
        args.num_blocks = kv_cache.shape[0]
        args.blocks = blocks.data_ptr()
        args.pages = kv_cache.data_ptr()
        args.page_block_stride, args.page_head_stride = kv_cache.stride()[:2]
        args.stream = current_stream(self.worker.device)
        if full:
            self.worker.codec.open(args)
        keys, values = self.worker.history[0, :tokens], self.worker.history[1, :tokens]
        if rest:
            # Which slot is known on the device only; an index there is no reason to wait.
            slot = step.open_slot.index_select(0, blocks[full : full + 1])
            rows = self.pool.index_select(0, slot)[0, :, :, :rest].transpose(1, 2)
            keys[full * block :].copy_(rows[0])
            values[full * block :].copy_(rows[1])
        return keys, values

    def _flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest_query: int,
        longest_key: int,
        *,
        causal: bool,
        out: torch.Tensor | None = None,
        want_lse: bool = False,
    ) -> Any:
        """vLLM's FlashAttention over raw rows, as its own backend calls it."""
        return flash_attention(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=longest_query,
            max_seqlen_k=longest_key,
            softmax_scale=self.scale,
            softcap=self.soft_cap,
            causal=causal,
            out=out,
            return_softmax_lse=want_lse,
        )


def attend_options(soft_cap: float, sinks: torch.Tensor | None) -> lib.AttendOptions | None:
    """What libkakeya takes of a layer's soft cap and sinks; None if it has neither."""
    if not soft_cap and sinks is None:
        return None
    return lib.AttendOptions(
        struct_size=ctypes.sizeof(lib.AttendOptions),
        soft_cap=soft_cap,
        sinks=None if sinks is None else sinks.data_ptr(),
    )


def current_stream(device: torch.device) -> int:
    """Address of the current stream, 0 for the default one and where there is no GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_flash_version: dict[int, int | None] = {}


def flash_version(head_size: int) -> int | None:
    """The FlashAttention that vLLM's own backend would take here; None: vLLM says there is none."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if head_size not in _flash_version:
        _flash_version[head_size] = get_flash_attn_version(head_size=head_size)
    return _flash_version[head_size]


def flash_attention(**arguments: Any) -> Any:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    # 0: as many parts of a sequence as FlashAttention finds good for the batch.
    splits = 1 if batch_invariant() else 0
    version = flash_version(arguments["q"].shape[-1])
    return flash_attn_varlen_func(**arguments, num_splits=splits, fa_version=version)


def merge_attention(*arguments: Any) -> None:
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merge_attn_states(*arguments)
