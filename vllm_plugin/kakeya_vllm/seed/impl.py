"""One layer's attention over the seed's pages, in torch.

A step is written first (another sequence of the step may read a page that it fills), then every
sequence attends, KV head by KV head: to each full block before the step through its page, to what
is open of the block that the step begins in, and to its own tokens raw. K and V of a context are
never there as a whole. Values are not decoded at all: the weights of a block's tokens are folded
through its codes, and the basis comes once a query (``BlockCodec.weighted_sums``). Keys were coded
before RoPE, which turns every token by another angle, so no product of a query and the basis holds
for all tokens of a block (those of single frequencies would, at D times the rank a query and token,
which is what decoding a key costs once for all queries). The keys of one block of one head are
decoded, looked at by all queries of the sequence, and dropped.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kakeya_vllm.backend import KakeyaMetadata
from kakeya_vllm.impl import KakeyaImpl
from kakeya_vllm.open_blocks import OpenBlockError
from kakeya_vllm.seed.recipe import SERVED_ROWS as BLOCK
from kakeya_vllm.support import UnsupportedFeature

# Query tokens of a sequence that look at raw keys together: what bounds the matrix of scores.
TILE = 512


class SeedImpl(KakeyaImpl):
    """Attention over the seed's pages and open blocks, for one layer."""

    block_tokens = BLOCK

    def bind(self, runtime: Any, layer: int, first_head: int) -> None:
        """Take the worker's runtime; ``first_head``: of this rank in the whole model."""
        if self.soft_cap or self.sinks is not None:
            what = "logits soft cap" if self.soft_cap else "attention sinks"
            raise UnsupportedFeature([f"{what} with a recipe of the seed"])
        self.runtime, self.layer, self.first_head = runtime, layer, first_head

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KakeyaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output [rows, heads, D]; key, value [rows, KV heads, D]; kv_cache [B, H, 1, P].

        Rows from the step's last token on are padding; their output is zero.
        """
        if attn_metadata is None:  # a profiling run: there is no cache yet
            return output.zero_()
        step = attn_metadata
        output[step.num_computed_rows :].zero_()
        self._store(step, key, value, kv_cache)
        starts = step.query_start.tolist()
        for i, length in enumerate(step.seq_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            blocks = step.block_table[i].tolist()
            before = length - (rows.stop - rows.start)
            for head in range(self.num_kv_heads):
                self._attend_head(
                    step, query, key, value, kv_cache, output, rows, before, blocks, head
                )
        return output

    def _store(
        self, step: KakeyaMetadata, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
    ) -> None:
        """Put K and V of the step into open blocks, and seal the blocks that became full."""
        places = step.slot_mapping
        blocks = torch.where(places >= 0, places.div(BLOCK, rounding_mode="floor"), -1)
        for block in blocks.unique().tolist():
            if block < 0:
                continue  # padding
            (rows,) = (blocks == block).nonzero(as_tuple=True)
            offsets = places[rows] % BLOCK
            slot = int(step.open_slot[block])
            full = int(offsets[-1]) == BLOCK - 1
            if slot >= 0:
                held = self.open_pool[slot]
                held[0][:, offsets] = key[rows].transpose(0, 1)
                held[1][:, offsets] = value[rows].transpose(0, 1)
            elif full and len(rows) == BLOCK:
                held = torch.stack((key[rows], value[rows])).transpose(1, 2)
            else:
                raise OpenBlockError(f"block {block} is written in part and is not open")
            if full:
                start = int(step.positions[rows[-1]]) - BLOCK + 1
                for head in range(self.num_kv_heads):
                    kv_cache[block, head, 0] = self.runtime.codec.seal(
                        self.layer, self.first_head + head, start, held[0, head], held[1, head]
                    )

    def _attend_head(
        self,
        step: KakeyaMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        rows: slice,
        before: int,
        blocks: list[int],
        head: int,
    ) -> None:
        """Attention of one sequence, whose tokens of this step are ``rows`` and which had
        ``before`` tokens, for the query heads of one KV head."""
        codec, index = self.runtime.codec, self.first_head + head
        group = self.num_heads // self.num_kv_heads
        heads = slice(head * group, (head + 1) * group)
        tokens = rows.stop - rows.start
        q = query[rows, heads].float().flatten(0, 1) * self.scale  # [tokens * group, D]
        sums = _Softmax(*q.shape)

        full = before // BLOCK
        for b in range(full):
            k, v = codec.open(kv_cache[blocks[b], head, 0])
            scores = q @ codec.keys(self.layer, index, b * BLOCK, k).T
            weights = sums.weights(slice(None), scores)
            sums.total += codec.weighted_values(self.layer, v, weights)

        k, v = key[rows, head].float(), value[rows, head].float()
        held = before % BLOCK
        if held:
            slot = int(step.open_slot[blocks[full]])
            if slot < 0:
                raise OpenBlockError(f"block {blocks[full]} is read raw and is not open")
            k = torch.cat((self.open_pool[slot, 0, head, :held].float(), k))
            v = torch.cat((self.open_pool[slot, 1, head, :held].float(), v))
        for first in range(0, tokens, TILE):
            last = min(first + TILE, tokens)
            part = slice(first * group, last * group)
            scores = q[part] @ k[: held + last].T
            place = held + torch.arange(first, last).repeat_interleave(group)
            later = torch.arange(held + last) > place[:, None]
            weights = sums.weights(part, scores.masked_fill_(later, -math.inf))
            sums.total[part] += weights @ v[: held + last]
        output[rows, heads] = sums.result().unflatten(0, (tokens, group)).to(output.dtype)


class _Softmax:
    """Running softmax of some queries over keys that come in parts."""

    def __init__(self, count: int, dim: int) -> None:
        self.largest = torch.full((count, 1), -math.inf)
        self.weight = torch.zeros(count, 1)
        self.total = torch.zeros(count, dim)

    def weights(self, part: slice, scores: torch.Tensor) -> torch.Tensor:
        """Weights [q, n] of n more keys by their scores, for the queries of ``part``; what was
        summed before is brought to the same scale. The caller adds their values to ``total``."""
        largest = torch.maximum(self.largest[part], scores.amax(-1, keepdim=True))
        shrink = (self.largest[part] - largest).exp()
        weights = (scores - largest).exp()
        self.largest[part] = largest
        self.weight[part] = self.weight[part] * shrink + weights.sum(-1, keepdim=True)
        self.total[part] *= shrink
        return weights

    def result(self) -> torch.Tensor:
        return self.total / self.weight
