"""One layer's attention: write K and V of the step, then attend. All arithmetic is libkakeya's."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kakeya_vllm import cuda, lib, support
from kakeya_vllm.allocation import allocating
from kakeya_vllm.backend import KakeyaMetadata
from kakeya_vllm.open_blocks import pool_size

_DTYPES = {
    torch.bfloat16: lib.DTYPE_BF16,
    torch.float16: lib.DTYPE_F16,
    torch.float32: lib.DTYPE_F32,
}


class KakeyaImpl(AttentionImpl[KakeyaMetadata]):
    """Attention over compressed pages and open blocks, for one layer."""

    block_tokens = lib.BLOCK_TOKENS

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        from vllm.config import get_current_vllm_config

        support.check_impl(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            others=others,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.soft_cap = float(logits_soft_cap or 0.0)  # vLLM's backends take 0 for none as well
        self.sinks = sinks  # the model's own parameter, by query head; it has no values yet
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.runtime: Any = None
        # Allocated with the layer, so that vLLM's memory profiling counts it. vLLM builds layers
        # under the model's dtype and device. Not cleared: only rows written before are read.
        num_open = pool_size(get_current_vllm_config())
        on_gpu = torch.get_default_device().type == "cuda"
        shape = (num_open + on_gpu, 2, self.num_kv_heads, self.block_tokens, head_size)
        dtype = torch.get_default_dtype()
        with allocating(
            f"the {num_open} open blocks of a layer",
            math.prod(shape) * dtype.itemsize,
            "every compressed layer has as many; lower max_num_seqs (--max-num-seqs)",
        ):
            self.open_pool = torch.empty(shape, dtype=dtype)
        self._cuda: cuda.CudaLayer | None = None
        if on_gpu:
            # The slot behind the pool is the null block's (cuda.py); dummy runs seal it.
            self.open_pool[num_open].zero_()
            cuda.flash_version(head_size)  # vLLM's settings are at hand only now
        self._write = lib.WriteArgs(struct_size=ctypes.sizeof(lib.WriteArgs))
        self._attend = lib.AttendArgs(struct_size=ctypes.sizeof(lib.AttendArgs))

    def bind(self, runtime: Any, layer: int, first_head: int) -> None:
        """Take the worker's runtime and fill in what is the same in every step."""
        self.runtime = runtime
        self._place = layer, first_head
        if self.sinks is not None:
            self.sinks = self.sinks.detach().float().contiguous()
        self._options = cuda.attend_options(self.soft_cap, self.sinks)
        if runtime.cuda is not None:
            self._cuda = cuda.CudaLayer(
                runtime.cuda,
                self.open_pool,
                layer,
                first_head,
                self.scale,
                soft_cap=self.soft_cap,
                sinks=self.sinks,
            )
            return
        num_open = self.open_pool.shape[0]
        for args in (self._write, self._attend):
            args.layer = layer
            args.first_head = first_head
            args.num_open = num_open
            args.open_blocks = self.open_pool.data_ptr()
        self._write.num_heads = self.num_kv_heads
        self._attend.num_kv_heads = self.num_kv_heads
        self._attend.num_q_heads = self.num_heads
        self._attend.scale = self.scale
        if runtime.settings.prefill == "sealed":
            self._attend.flags = lib.ATTEND_SEALED_PREFILL

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KakeyaMetadata | cuda.KakeyaCudaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output [rows, heads, D]; key, value [rows, KV heads, D]; kv_cache [B, H, 1, P].

        Rows from the step's last token on are padding; their output is zero on the CPU and left as
        it is on a GPU, as vLLM's own backends do.
        """
        if attn_metadata is None:  # a profiling run: there is no cache yet
            return output.zero_()
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.stride(-1) != 1:
                raise ValueError(f"{name} must be contiguous in its last dimension")
        step, verifier = attn_metadata, self.runtime.verifier
        if self._cuda is not None:
            self._cuda.write(step, key, value, kv_cache)
        else:
            output[step.num_computed_rows :].zero_()
            self._fill(step, query, key, value, kv_cache, output)
            self.runtime.codec.write(self._write)
        if verifier is not None:
            verifier.written(*self._place, step, key, value, kv_cache, self.open_pool)
        if self._cuda is not None:
            self._cuda.read(step, query, key, value, kv_cache, output)
        else:
            self.runtime.codec.attend(self._attend, self._options)
        if verifier is not None:
            tensors = query, key, value, kv_cache, self.open_pool, output
            verifier.attended(
                *self._place, step, self.scale, *tensors, soft_cap=self.soft_cap, sinks=self.sinks
            )
        return output

    def _fill(
        self,
        step: KakeyaMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Point both argument structures at this step's tensors."""
        write, attend = self._write, self._attend
        dtype = _DTYPES[query.dtype]
        for args in (write, attend):
            args.dtype = dtype
            args.num_tokens = step.num_tokens
            args.num_blocks = kv_cache.shape[0]
            args.k = key.data_ptr()
            args.v = value.data_ptr()
            args.k_token_stride, args.k_head_stride = key.stride()[:2]
            args.v_token_stride, args.v_head_stride = value.stride()[:2]
            args.pages = kv_cache.data_ptr()
            args.page_block_stride, args.page_head_stride = kv_cache.stride()[:2]
            args.open_slot = step.open_slot.data_ptr()
        write.slot_mapping = step.slot_mapping.data_ptr()
        write.positions = step.positions.data_ptr()
        attend.num_seqs = step.num_seqs
        attend.max_blocks_per_seq = step.block_table.shape[1]
        attend.q = query.data_ptr()
        attend.q_token_stride, attend.q_head_stride = query.stride()[:2]
        attend.out = output.data_ptr()
        attend.out_token_stride, attend.out_head_stride = output.stride()[:2]
        attend.query_start = step.query_start.data_ptr()
        attend.seq_lens = step.seq_lens.data_ptr()
        attend.block_table = step.block_table.data_ptr()
        attend.block_table_stride = step.block_table.stride(0)
