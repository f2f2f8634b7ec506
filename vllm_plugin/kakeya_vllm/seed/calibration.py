"""Calibration of the seed's recipes: Sigma_q of every layer and head, and fitted tables.

`kakeya calibrate MODEL --text TEXT --for v1.3-ppl` runs the text through the stock engine twice.
The first time it sums q q^T of the queries before RoPE; the second time it codes keys (whitened,
and not) and values as the recipe would and fits Lloyd-Max tables of 1 to 4 bits to the values that
its codes are of. The last passage is left out of the fit, and what the tables are worth on it is
written into the artefact. The file has, for L layers, H KV heads and head dimension D:

    sigma_q                            float32 [L, H, D, D]
    k_table_B, k_plain_table_B,        float32 [2^B]; of whitened keys, of keys, of values
    v_table_B                          for B = 1 .. 4
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kakeya_vllm import __version__, engine
from kakeya_vllm.calibrate import Unrotation, artefact_bytes, sample_of_text, write_artefact
from kakeya_vllm.config import (
    cache_dir,
    check_metadata,
    expanded,
    is_file,
    model_fingerprint,
    read_metadata,
)
from kakeya_vllm.rope import find as find_rope
from kakeya_vllm.seed import recipe as recipes
from kakeya_vllm.seed import scalar, whitening
from kakeya_vllm.seed.codec import BlockCodec
from kakeya_vllm.seed.recipe import SeedRecipe, StreamRecipe
from kakeya_vllm.text import BUNDLED_TEXT, detokenise, read_text, refuse_test_text, tokenise

FORMAT = "kakeya-seed-calibration-1"
VARIABLE = "KAKEYA_SEED_CALIBRATION"
STREAMS = ("k", "k_plain", "v")


class CalibrationError(ValueError):
    """An artefact that cannot be used, or is missing: says why and what to do."""


def default_path(fingerprint: str, env: dict[str, str] | None = None) -> Path:
    """Where an artefact is looked for when VARIABLE names none."""
    return cache_dir(env) / "calibration" / f"{fingerprint}.seed.safetensors"


@dataclasses.dataclass
class Artefact:
    """What a recipe takes from a calibration file: ``sigma_q`` [L, H, D, D] and ``tables`` by
    (one of STREAMS, bits)."""

    path: str
    metadata: dict[str, str]
    sigma_q: torch.Tensor
    tables: dict[tuple[str, int], tuple[float, ...]]


def load(path: str | Path, fingerprint: str, shape: tuple[int, int, int]) -> Artefact:
    """The artefact of the model with this fingerprint and (layers, KV heads, head dimension).

    CalibrationError or config.ConfigError for a file of another format, model or shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise CalibrationError(f"{path} is not a file")
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} has format {metadata.get('format')!r}; this version reads {FORMAT}. Make one "
            "with `kakeya calibrate MODEL --text TEXT --for v1.3-ppl`"
        )
    check_metadata(path, fingerprint, FORMAT)
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path} is not a whole safetensors file: {error}") from error
    layers, heads, dim = shape
    expected = {"sigma_q": (layers, heads, dim, dim)}
    expected |= {f"{s}_table_{b}": (1 << b,) for s in STREAMS for b in scalar.BITS}
    for name, size in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != size:
            raise CalibrationError(f"{path}: {name} has shape {found}, expected {size}")
    tables = {
        (s, b): scalar.check_table(tensors[f"{s}_table_{b}"].tolist(), b, f"{s}_table_{b}")
        for s in STREAMS
        for b in scalar.BITS
    }
    return Artefact(str(path), metadata, tensors["sigma_q"], tables)


def find_path(
    recipe: SeedRecipe,
    model: str,
    fingerprint: str,
    chosen: str | None = None,
    env: dict[str, str] | None = None,
) -> Path:
    """Where the artefact that a recipe needs is: ``chosen``, VARIABLE or the default place.

    CalibrationError if there is no file.
    """
    env = dict(os.environ) if env is None else env
    path = expanded(str(chosen or env.get(VARIABLE) or default_path(fingerprint, env)), VARIABLE)
    if not is_file(path, VARIABLE):
        raise CalibrationError(
            f"recipe {recipe.name} needs a calibration and there is none at {path}. Make one "
            f"with `kakeya calibrate {model} --text TEXT --for {recipe.name}`, or name one with "
            f"{VARIABLE}"
        )
    return path


def find_artefact(recipe: SeedRecipe, model: str, hf_config: Any, shape: tuple) -> Artefact | None:
    """The artefact that a recipe needs, from VARIABLE or the default place, or None."""
    if not recipe.needs_calibration:
        return None
    fingerprint = model_fingerprint(hf_config)
    return load(find_path(recipe, model, fingerprint), fingerprint, shape)


class Rows:
    """Hooks on the attention layers that hand (layer, q, k, v) of whole passages to a function:
    float32 [tokens, heads, D], q and k before RoPE."""

    def __init__(self, model: Any, vllm_config: Any) -> None:
        self.layers = engine.attention_layers(model)
        names = [name for name, _ in self.layers]
        first = self.layers[0][1]
        self.shape = (len(names), first.num_kv_heads, first.head_size)
        device = next(model.parameters()).device
        self.unrotate = Unrotation(find_rope(model, names, vllm_config), first.head_size, device)
        self.device = device

    @contextlib.contextmanager
    def handed_to(self, function: Callable[..., None]):
        """The hooks are on the model for the length of a with block."""

        def hook_of(index: int, module: Any):
            def hook(_module, args, kwargs):
                values = list(args) + [kwargs[n] for n in ("query", "key", "value")[len(args) :]]
                heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
                q, k, v = (
                    x.reshape(-1, n, module.head_size) for x, n in zip(values, heads, strict=False)
                )
                function(index, self.unrotate(q).float(), self.unrotate(k).float(), v.float())

            return hook

        handles = [
            module.register_forward_pre_hook(hook_of(i, module), with_kwargs=True)
            for i, (_, module) in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def blocks_of(x: torch.Tensor, recipe: StreamRecipe) -> torch.Tensor:
    """Whole blocks [streams, B, n, D] of rows [tokens, heads, D]: each head's own rows, or the rows
    of all heads as they lie (token by token), pooled into one stream."""
    n, d = recipe.block_rows, x.shape[-1]
    rows = x.transpose(0, 1) if recipe.grouping == "per-head" else x.reshape(1, -1, d)
    whole = rows.shape[1] // n
    return rows[:, : whole * n].reshape(rows.shape[0], whole, n, d)


class Pools:
    """Values that scalar codes are of, by stream: those to fit on and those held out."""

    def __init__(self, recipe: SeedRecipe, factor: list, values_a_call: int) -> None:
        self.recipe, self.factor, self.limit = recipe, factor, values_a_call
        self.codecs = {
            "k": BlockCodec(_plain(recipe.k)),
            "v": BlockCodec(_plain(recipe.v)),
        }
        self.fitted: dict[str, list[torch.Tensor]] = {s: [] for s in STREAMS}
        self.held_out: dict[str, list[torch.Tensor]] = {s: [] for s in STREAMS}
        self.holding_out = False

    def add(self, layer: int, _q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        streams = {"k_plain": k, "v": v}
        if layer not in self.recipe.sigma_skip_layers:
            streams["k"] = whitening.whiten(k, self.factor[layer])
        for name, rows in streams.items():
            codec = self.codecs[name[0]]
            values = codec.residuals(blocks_of(rows, codec.recipe))
            # Every so many: the transform has made the coordinates of a row alike.
            stride = -(-len(values) // self.limit)
            to = self.held_out if self.holding_out else self.fitted
            to[name].append(values[::stride].cpu())

    def tables(self) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
        """Tables by name, and held-out errors of each beside the Gaussian table's."""
        tables, errors = {}, {}
        for s in STREAMS:
            pool, held_out = torch.cat(self.fitted[s]), torch.cat(self.held_out[s])
            for b in scalar.BITS:
                levels = scalar.lloyd(pool, scalar.GAUSSIAN[b])
                tables[f"{s}_table_{b}"] = torch.tensor(levels)
                errors[f"{s}_table_{b}"] = {
                    "gaussian": scalar.table_error(held_out, scalar.GAUSSIAN[b]),
                    "fitted": scalar.table_error(held_out, levels),
                }
        return tables, errors


def _plain(stream: StreamRecipe) -> StreamRecipe:
    """The stream's recipe without what needs the table that is being made."""
    changes = {"table": "gaussian", "outlier_threshold": None, "outlier_budget": None}
    return dataclasses.replace(stream, **changes)


def collect(
    llm: Any, passages: list[list[int]], recipe: SeedRecipe
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of the artefact, and the part of its metadata that they decide. At least two
    passages: the last is held out of the tables' fit."""
    from tqdm import tqdm

    if len(passages) < 2:
        raise SystemExit("kakeya: --for needs two passages or more: the last is held out")
    vllm_config = llm.llm_engine.vllm_config
    rows = engine.on_model(llm, lambda model: Rows(model, vllm_config))
    layers, heads, dim = rows.shape
    sums = torch.zeros(layers, heads, dim, dim, dtype=torch.float64, device=rows.device)
    counted = 0

    def add_queries(layer: int, q: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor) -> None:
        nonlocal counted
        sums[layer] += whitening.second_moment(q, heads)
        counted += q.shape[0] * q.shape[1] // heads

    total = 2 * sum(map(len, passages))
    with tqdm(total=total, unit="tok", unit_scale=True, desc="calibrating") as bar:
        with rows.handed_to(add_queries):
            for passage in passages:
                engine.run_prompt(llm, passage)
                bar.update(len(passage))
        sigma = sums / (counted / layers)
        factor = [
            whitening.factors(s, recipe.ridge, recipe.condition_cap, "unit")[0] for s in sigma
        ]
        pools = Pools(recipe, factor, scalar.POOL // (layers * len(passages)))
        with rows.handed_to(pools.add):
            for i, passage in enumerate(passages):
                pools.holding_out = i == len(passages) - 1
                engine.run_prompt(llm, passage)
                bar.update(len(passage))
    tables, errors = pools.tables()
    tensors = {"sigma_q": sigma.float().cpu().contiguous()} | tables
    return tensors, {
        "recipe": recipe.name,
        "tokens": str(total // 2),
        "num_layers": str(layers),
        "num_kv_heads": str(heads),
        "head_dim": str(dim),
        "held_out_error": json.dumps(errors),
    }


def calibrate_for(
    model: str, text_path: str | None, tokens: int, name: str, out: str | None = None
) -> Path:
    """Write the artefact of recipe ``name`` for ``model``; ``tokens`` and the text as in
    :func:`kakeya_vllm.calibrate.calibrate`. The WikiText-2 test split is refused."""
    recipe = recipes.find(name)
    if recipe is None or recipe.k.codec != "pca" or recipe.v.codec != "pca":
        valid = ", ".join(n for n, r in recipes.PRESETS.items() if r.k.codec == "pca")
        raise SystemExit(f"kakeya: --for {name}: valid are {valid}, and files with such a base")
    path = BUNDLED_TEXT if text_path is None else text_path
    text = read_text(path)
    refuse_test_text(text, path)
    sample = sample_of_text(tokenise(model, detokenise(text)), tokens, path)
    print(f"kakeya: loading {model}", flush=True)
    llm = engine.in_process_engine(model)
    fingerprint = model_fingerprint(llm.llm_engine.vllm_config.model_config.hf_text_config)
    tensors, about = collect(llm, sample.passages, recipe)
    target = Path(out) if out else default_path(fingerprint)
    return write(target, tensors, fingerprint, model, sample.about | about)


def write(
    target: Path,
    tensors: dict[str, torch.Tensor],
    fingerprint: str,
    model: str,
    about: dict[str, str],
) -> Path:
    """The artefact of ``tensors``, with ``about`` in its metadata; returns ``target``."""
    metadata = {
        "format": FORMAT,
        "model_fingerprint": fingerprint,
        "model": Path(model).name,
        "kakeya_version": __version__,
        **about,
    }
    write_artefact(target, artefact_bytes(tensors, metadata))
    return target
