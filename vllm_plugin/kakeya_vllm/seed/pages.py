"""Pages of the seed's recipes: 512 tokens of one KV head, as a K slot and then a V slot.

A page has the size of its recipe's full rank. A block whose rows are all alike has rank 1 and
smaller slots; each slot then ends earlier than its room, and the rest of the room is zero.
"""

from __future__ import annotations

from typing import Any

import torch

from kakeya_vllm.rope import Rope
from kakeya_vllm.seed import slots, whitening
from kakeya_vllm.seed.calibration import Artefact
from kakeya_vllm.seed.codec import Encoded
from kakeya_vllm.seed.coder import SeedCoder
from kakeya_vllm.seed.recipe import SERVED_ROWS, SeedRecipe, StreamRecipe
from kakeya_vllm.seed.transform import next_power_of_two

STREAMS = ("k", "v")


def slot_room(stream: StreamRecipe, d: int) -> int:
    """Bytes that a page has for a stream's slot: those of a slot of the highest rank that the
    recipe gives heads of dimension ``d``, with its whole budget of outliers."""
    if stream.pca == "exact":
        rank = min(stream.rank_cap or d, d)
    else:
        rank = min(max(round(d * stream.rank_factor), min(8, d)), d)
    return slots.slot_bytes(stream, n=SERVED_ROWS, d=d, rank=rank, length=next_power_of_two(rank))


def page_bytes(recipe: SeedRecipe, d: int) -> int:
    """Bytes of a page: 512 tokens of a KV head of dimension ``d`` under a served recipe."""
    return slot_room(recipe.k, d) + slot_room(recipe.v, d)


class PageCodec:
    """Writes and reads the pages of one model's layers.

    ``recipe``: a served one; ``shape``: layers, KV heads and head dimension of the whole model;
    ``artefact``: where the recipe needs one.
    """

    def __init__(
        self,
        recipe: SeedRecipe,
        shape: tuple[int, int, int],
        rope: Rope | None,
        artefact: Artefact | None,
    ) -> None:
        self.recipe = recipe
        self.head_dim = shape[2]
        self.room = {s: slot_room(getattr(recipe, s), self.head_dim) for s in STREAMS}
        self._coder = SeedCoder(recipe, shape, rope, torch.device("cpu"), artefact)

    def page_bytes(self, _layer: int = 0) -> int:
        """Bytes of a page of one KV head."""
        return sum(self.room.values())

    def describe(self) -> dict[str, Any]:
        """What the start-up log says."""
        raw = 2 * 2 * SERVED_ROWS * self.head_dim
        return {
            "name": self.recipe.name,
            "ratio": raw / self.page_bytes(),
            "quantizer": f"{self.recipe.k.codec}/{self.recipe.v.codec}",
            "page_bytes": self.page_bytes(),
        }

    def seal(
        self, layer: int, head: int, start: int, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """The page, uint8 [page_bytes], of K (rotated) and V [512, D] of a head whose first token
        stands at position ``start``; ``layer`` and ``head`` are those of the whole model.

        The head is coded by itself, whatever else a step has, so a page is a function of its rows.
        ValueError (RuntimeError for a list of outliers that is too long) names layer, head, block
        and stream.
        """
        page = torch.zeros(self.page_bytes(), dtype=torch.uint8)
        at = 0
        for stream, rows in (("k", k), ("v", v)):
            try:
                slot = self._slot(stream, layer, head, start, rows)
            except (ValueError, RuntimeError) as error:
                raise type(error)(
                    f"layer {layer}, KV head {head}, block {start // SERVED_ROWS} (tokens {start} "
                    f"to {start + SERVED_ROWS - 1}), {'keys' if stream == 'k' else 'values'}: "
                    f"{error}"
                ) from error
            page[at : at + len(slot)] = torch.frombuffer(bytearray(slot), dtype=torch.uint8)
            at += self.room[stream]
        return page

    def open(self, page: torch.Tensor) -> tuple[Encoded, Encoded]:
        """K and V of a page, as codes. ValueError if it holds no slots of this recipe."""
        data, at, found = page.numpy().tobytes(), 0, []
        for stream in STREAMS:
            recipe: StreamRecipe = getattr(self.recipe, stream)
            slot = data[at : at + self.room[stream]]
            size = slots.packed_bytes(recipe, slot, SERVED_ROWS, self.head_dim)
            found.append(slots.unpack(recipe, slot[:size], SERVED_ROWS, self.head_dim))
            at += self.room[stream]
        return found[0], found[1]

    def keys(self, layer: int, head: int, start: int, k: Encoded) -> torch.Tensor:
        """Float32 [512, D]: the keys of an opened page as attention looks at them, rotated."""
        rows = self._codec("k", layer).decode(k)[0][:, None]
        if factor := self._coder.factors.get(layer):
            rows = whitening.whiten(rows, factor[1][head : head + 1])
        return self._coder.rotate(rows, start).float()[:, 0]

    def weighted_values(self, layer: int, v: Encoded, weights: torch.Tensor) -> torch.Tensor:
        """Float32 [q, D]: sums of the values of an opened page, times ``weights`` [q, 512]."""
        return self._codec("v", layer).weighted_sums(v, weights)

    def _slot(self, stream: str, layer: int, head: int, start: int, rows: torch.Tensor) -> bytes:
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("a value is not finite")
        block = rows.float()[:, None]
        if stream == "k":
            block = self._coder.unrotate(block, start).float()
            if factor := self._coder.factors.get(layer):
                block = whitening.whiten(block, factor[0][head : head + 1])
        codec = self._codec(stream, layer)
        encoded = codec.encode(block.transpose(0, 1)[None])
        return slots.pack(codec.recipe, encoded, 0, codec.metric)

    def _codec(self, stream: str, layer: int) -> Any:
        whitened = stream == "k" and layer in self._coder.factors
        return self._coder.codec(stream, getattr(self.recipe, stream), whitened)
