"""The seed's recipes as an attention backend: pages of 512 tokens, on the CPU.

Everything but the page and the arithmetic is KAKEYA's own backend: open blocks, metadata, boundary
layers, and how vLLM is followed. A page of a KV head is its K slot and its V slot (:mod:`.pages`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec

from kakeya_vllm import config
from kakeya_vllm.backend import KakeyaBackend, KakeyaMetadataBuilder
from kakeya_vllm.seed.pages import page_bytes
from kakeya_vllm.seed.recipe import SERVED_ROWS

PATH = "kakeya_vllm.seed.backend.SeedBackend"


class SeedBackend(KakeyaBackend):
    """Full attention over slots of the seed."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [SERVED_ROWS]

    @staticmethod
    def get_impl_cls() -> type:
        from kakeya_vllm.seed.impl import SeedImpl

        return SeedImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return KakeyaMetadataBuilder

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size in (None, SERVED_ROWS)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """One state of both slots a block and KV head instead of 512 states of K and V."""
        return replace(
            spec,
            dtype=torch.uint8,
            state_content_bytes=page_bytes(config.current().seed, spec.head_size),
            tokens_per_state=SERVED_ROWS,
        )
