"""The attention backend as vLLM sees it: what a page looks like and what a step looks like.

A KV-cache page of a layer is one compressed page of P bytes per KV head for 128 tokens, so vLLM's
logical tensor ``[blocks, heads, states, bytes]`` has one state a block: ``[B, H, 1, P]`` uint8. In
a hybrid model a block of the scheduler is several of these (hybrid.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kakeya_vllm import config, cuda, lib
from kakeya_vllm.register import NAME


class KakeyaBackend(AttentionBackend):
    """Compressed full attention for decoder layers."""

    accept_output_buffer = True
    # Write and attend are one call of the layer: the write seals blocks that other sequences of
    # the same step may read, and both need the same metadata.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16"]
    # Bytes of a block of one layer, where the engine that is being built shares its blocks with
    # sliding-window layers (Runtime sets it); None: what the pages take. Of the class because vLLM
    # asks the class.
    shared_block_bytes: ClassVar[int | None] = None

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [lib.BLOCK_TOKENS]

    @staticmethod
    def get_impl_cls() -> type:
        from kakeya_vllm.impl import KakeyaImpl

        return KakeyaImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        from vllm.platforms import current_platform

        return KakeyaMetadataBuilder if current_platform.is_cpu() else KakeyaCudaMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # which ones, says transfer.py

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """On a GPU: kakeya_cuda_limits.batch_invariant, and prompts in one part."""
        from vllm.platforms import current_platform

        return current_platform.is_cuda()

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        # vLLM's own test accepts multiples; a page here is exactly one block.
        return block_size in (None, lib.BLOCK_TOKENS)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """One state of P bytes a block and KV head instead of 128 states of K and V."""
        page_bytes = lib.load().recipe_page_bytes(config.current().recipe, spec.head_size)
        packed = replace(
            spec,
            dtype=torch.uint8,
            state_content_bytes=page_bytes,
            tokens_per_state=lib.BLOCK_TOKENS,
        )
        if cls.shared_block_bytes is None or spec.block_size != lib.BLOCK_TOKENS:
            return packed
        return replace(packed, page_size_padded=cls.shared_block_bytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def require(cls, selector_config: Any) -> None:
        """Raise ValueError with vLLM's own reasons if a layer cannot use this backend."""
        reasons = cls.validate_configuration(device_capability=None, **selector_config._asdict())
        if reasons:
            raise ValueError(f"KAKEYA cannot be used for a layer of this model: {reasons}")


@dataclass
class KakeyaMetadata(AttentionMetadata):
    """One step, as kakeya_write and kakeya_attend take it. All tensors are contiguous.

    ``query_start`` int32 [seqs + 1], ``seq_lens`` int32 [seqs], ``block_table`` int32
    [seqs, max_blocks] (row stride may be larger), ``slot_mapping`` int64 [tokens] (-1 = padding),
    ``positions`` int32 [tokens], ``open_slot`` int32 [blocks].
    """

    num_tokens: int
    num_computed_rows: int  # rows that belong to a sequence; the rest up to num_tokens is padding
    num_seqs: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    open_slot: torch.Tensor


class KakeyaMetadataBuilder(AttentionMetadataBuilder[KakeyaMetadata]):
    """Builds the metadata of a step once for all compressed layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        self.runtime = context[layer_names[0]].impl.runtime

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KakeyaMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("KAKEYA does not support: non-causal attention")
        num_tokens = common.num_actual_tokens
        query_start = common.query_start_loc.to(torch.int32).contiguous()
        seq_lens = common.seq_lens.to(torch.int32).contiguous()
        rows = int(query_start[-1])
        return KakeyaMetadata(
            num_tokens=num_tokens,
            num_computed_rows=rows,
            num_seqs=seq_lens.shape[0],
            query_start=query_start,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor.to(torch.int32),
            slot_mapping=common.slot_mapping[:num_tokens].to(torch.int64).contiguous(),
            positions=positions_of(query_start, seq_lens, num_tokens),
            open_slot=self.runtime.open_blocks.open_slot,
        )


class KakeyaCudaMetadataBuilder(AttentionMetadataBuilder[cuda.KakeyaCudaMetadata]):
    """The same on a GPU: launches the plan of the step, and never waits for the device.

    Full CUDA graphs hold steps in which every sequence decodes (one token, and drafts to verify).
    The plan is made outside of the graph, in :meth:`build`, which vLLM calls before every replay.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decoding sequences first, so that prefills are neighbours and share launches.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        context = vllm_config.compilation_config.static_forward_context
        self.planner = cuda.Planner(context[layer_names[0]].impl.runtime.cuda)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: Any, kv_cache_spec: Any) -> int:
        # Lengths come from the device's query_start_loc, so they may differ within a batch.
        return cuda.max_query(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> cuda.KakeyaCudaMetadata:
        if common_attn_metadata.causal is not True:
            raise ValueError("KAKEYA does not support: non-causal attention")
        return self.planner.build(common_attn_metadata)


def positions_of(
    query_start: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Position of every row: the rows of a sequence are its last tokens. Padding rows get 0.

    ``query_start`` int32 [seqs + 1], ``seq_lens`` int32 [seqs] -> int32 [num_tokens].
    """
    query_lens = query_start[1:] - query_start[:-1]
    rows = int(query_start[-1])
    # position = row - first row of its sequence + tokens of the sequence before this step
    shift = seq_lens - query_lens - query_start[:-1]
    positions = torch.zeros(num_tokens, dtype=torch.int32)
    positions[:rows] = torch.arange(rows, dtype=torch.int32) + torch.repeat_interleave(
        shift, query_lens.long()
    )
    return positions
