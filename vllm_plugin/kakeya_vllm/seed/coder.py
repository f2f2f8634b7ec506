"""A recipe of the seed as the coder of :class:`kakeya_vllm.evaluation.simulate.Hooks`.

Keys come rotated; a recipe with ``key_position`` "pre-rope" has them turned back by position,
whitened where it says so, coded, and brought back the same way. What a block does not fill stays as
it is. ``stored`` has the bytes of the last call, by stream: slots or rows, and two bytes for every
value that is not coded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kakeya_vllm import engine, lib
from kakeya_vllm.calibrate import Unrotation
from kakeya_vllm.rope import Rope
from kakeya_vllm.rope import find as find_rope
from kakeya_vllm.seed import turboquant, whitening
from kakeya_vllm.seed.calibration import Artefact, blocks_of, find_artefact
from kakeya_vllm.seed.codec import BlockCodec
from kakeya_vllm.seed.recipe import SeedRecipe, StreamRecipe

RAW_BYTES = 2  # of a value in bf16, whatever dtype an evaluation computes in


class SeedCoder:
    """Codes K and V of one model's layers. ``artefact``: where the recipe needs one."""

    def __init__(
        self,
        recipe: SeedRecipe,
        shape: tuple[int, int, int],
        rope: Rope | None,
        device: torch.device,
        artefact: Artefact | None = None,
    ) -> None:
        self.recipe, self.artefact, self.device = recipe, artefact, device
        self.layers, _, dim = shape
        self.boundary = recipe.boundary(self.layers)
        back = rope and dataclasses.replace(rope, inv_freq=tuple(-f for f in rope.inv_freq))
        self.unrotate, self.rotate = Unrotation(rope, dim, device), Unrotation(back, dim, device)
        self.factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if recipe.sigma_q:
            for layer in set(range(self.layers)) - set(recipe.sigma_skip_layers):
                sigma = artefact.sigma_q[layer].to(device)
                if recipe.sigma_lags == "averaged":
                    sigma = whitening.lag_averaged(sigma, rope)
                self.factors[layer] = whitening.factors(
                    sigma, recipe.ridge, recipe.condition_cap, recipe.sigma_scale
                )
        self.codecs: dict[tuple, BlockCodec] = {}
        self.stored: dict[str, int] = {}
        self.ranks: dict[str, dict[int, list[int]]] = {"k": {}, "v": {}}

    @classmethod
    def of_engine(cls, recipe: SeedRecipe, llm: Any, model: Any) -> SeedCoder:
        """For the model of an engine; CalibrationError if its artefact is missing or another's."""
        vllm_config = llm.llm_engine.vllm_config
        config = vllm_config.model_config
        layers = engine.attention_layers(model)
        shape = (len(layers), layers[0][1].num_kv_heads, layers[0][1].head_size)
        rope = find_rope(model, [name for name, _ in layers], vllm_config)
        artefact = find_artefact(recipe, config.model, config.hf_text_config, shape)
        return cls(recipe, shape, rope, next(model.parameters()).device, artefact)

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [tokens, heads, D] as attention gets them, of a sequence's first tokens: those of
        the first ``blocks`` blocks of 128 as the codec gives them back, in the same dtype; the rest
        as it is."""
        self.stored = {}
        tokens = blocks * lib.BLOCK_TOKENS
        return self._keys(layer, k, tokens), self._stream("v", layer, v, v[:tokens].float())

    def _keys(self, layer: int, k: torch.Tensor, tokens: int) -> torch.Tensor:
        rows = k[:tokens].float()
        before = self.recipe.key_position == "pre-rope"
        factor = self.factors.get(layer)
        if before:
            rows = self.unrotate(rows).float()
        if factor:
            rows = whitening.whiten(rows, factor[0])

        def back(coded: torch.Tensor) -> torch.Tensor:
            coded = whitening.whiten(coded, factor[1]) if factor else coded
            return self.rotate(coded).float() if before else coded

        return self._stream("k", layer, k, rows, back)

    def _stream(
        self, stream: str, layer: int, original: torch.Tensor, rows: torch.Tensor, back=None
    ) -> torch.Tensor:
        """``original`` with the rows that are coded replaced; sets ``stored`` of the stream."""
        recipe: StreamRecipe = getattr(self.recipe, stream)
        if layer in self.boundary and self.recipe.boundary_mode == "bf16":
            recipe = dataclasses.replace(recipe, codec="raw")
        elif layer in self.boundary:
            bits = self.recipe.boundary_bits
            recipe = dataclasses.replace(recipe, bits=bits, table="gaussian")
        if recipe.codec == "raw":
            self.stored[stream] = original.numel() * RAW_BYTES
            return original
        d = rows.shape[-1]
        if recipe.codec == "noise":
            generator = torch.Generator().manual_seed(2 * layer + (stream == "v"))
            drawn = torch.randn(rows.shape, generator=generator).to(rows.device)
            coded = rows + recipe.noise * rows.square().mean().sqrt() * drawn
            done, size = rows.numel() // d, rows.numel() * RAW_BYTES
        elif recipe.codec == "pca":
            coded, done, size = self._blocks(stream, layer, rows, recipe)
        else:
            coded, done = turboquant.round_trip(rows, recipe), rows.numel() // d
            size = done * turboquant.row_bits(recipe, d) // 8
        if back is not None:
            coded = back(coded)
        new = original.clone(memory_format=torch.contiguous_format)
        if recipe.grouping == "per-head" or recipe.codec != "pca":
            tokens = done // rows.shape[1]
            new[:tokens] = coded[:tokens].to(new.dtype)
        else:
            new.view(-1, d)[:done] = coded.reshape(-1, d)[:done].to(new.dtype)
        sinks = min(self.recipe.sink_tokens, rows.shape[0])
        new[:sinks] = original[:sinks]
        size += original[:sinks].numel() * RAW_BYTES
        self.stored[stream] = size + (original.numel() - done * d) * RAW_BYTES
        return new

    def _blocks(
        self, stream: str, layer: int, rows: torch.Tensor, recipe: StreamRecipe
    ) -> tuple[torch.Tensor, int, int]:
        """Rows with whole blocks coded, how many rows these are, and their bytes."""
        whitened = stream == "k" and layer in self.factors
        codec = self.codec(stream, recipe, whitened)
        blocks = blocks_of(rows, recipe)
        streams, count, n, d = blocks.shape
        done = streams * count * n
        coded = rows.clone(memory_format=torch.contiguous_format)
        if not count:
            return coded, 0, 0
        try:
            encoded = codec.encode(blocks)
        except ValueError as error:
            raise type(error)(f"layer {layer}, {stream}: {error}") from None
        self.ranks[stream][layer] = encoded.basis.rank.tolist()
        decoded = codec.decode(encoded).reshape(streams, count * n, d)
        if recipe.grouping == "per-head":
            coded[: count * n] = decoded.transpose(0, 1)
        else:
            coded.view(-1, d)[:done] = decoded[0]
        return coded, done, codec.stored_bytes(encoded, d)

    def codec(self, stream: str, recipe: StreamRecipe, whitened: bool) -> BlockCodec:
        """The codec of keys (whitened or not) or values under a stream's recipe."""
        key = (stream, recipe, whitened)
        if key not in self.codecs:
            table = None
            if recipe.table == "calibrated":
                kind = "k_plain" if stream == "k" and not self.recipe.sigma_q else stream
                table = self.artefact.tables[kind, recipe.bits]
            # The seed's harness: keys that are not whitened have the metric inner_product.
            metric = "inner_product" if stream == "k" and not whitened else "mse"
            self.codecs[key] = BlockCodec(recipe, metric, table)
        return self.codecs[key]

    def describe(self) -> dict[str, Any]:
        """What an evaluation's JSON says of the codec."""
        spread = {
            stream: {
                layer: [min(ranks), sum(ranks) / len(ranks), max(ranks)]
                for layer, ranks in sorted(by_layer.items())
            }
            for stream, by_layer in self.ranks.items()
        }
        return {
            "name": self.recipe.name,
            "quantizer": f"{self.recipe.k.codec}/{self.recipe.v.codec}",
            "recipe": dataclasses.asdict(self.recipe),
            "calibrated": self.artefact is not None,
            "calibration": self.artefact.metadata if self.artefact else None,
            "boundary_layers": sorted(self.boundary),
            "rank": spread,
        }
