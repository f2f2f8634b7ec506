"""Recipes of the seed and its rivals: every switch, its valid values, and the names.

A recipe is a name (``v1.3-ppl``, ``turboquant-sim-k8v4``, ``d4-10``) or a JSON file that changes
single switches of one: ``{"base": "v1.3-ppl", "variance_ratio": 0.95, "v_bits": 3}``. A switch of a
stream holds for both streams, or for one with ``k_`` or ``v_`` before it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = ("mse", "inner_product", "linf")
# One of each is what a field may be; the first is the default.
CHOICES: dict[str, tuple[Any, ...]] = {
    "codec": ("pca", "lloyd-max", "uniform", "absmax", "fp8", "d4", "e8", "noise", "raw"),
    "grouping": ("pooled", "per-head"),
    "pca": ("randomized", "exact"),
    "metric": ("auto", *METRICS),
    "residual_norm": ("restored", "unit"),
    "skeleton_dtype": ("float16", "float32"),
    "sigma_scale": ("unit", "raw"),
    "sigma_lags": ("zero", "averaged"),
    "key_position": ("pre-rope", "post-rope"),
    "boundary_mode": ("bf16", "conservative"),
}
# (lowest, highest) of numbers.
RANGES: dict[str, tuple[float, float]] = {
    "bits": (1, 8),
    "block_rows": (2, 4096),
    "rank_factor": (0.01, 1.0),
    "rank_cap": (1, 4096),
    "oversample": (0, 64),
    "power_iterations": (0, 16),
    "variance_ratio": (0.0, 1.0),
    "clusters": (0, 4096),
    "second_clusters": (0, 4096),
    "kmeans_iterations": (1, 1000),
    "outlier_threshold": (0.0, 100.0),
    "outlier_budget": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
    "q": (1, 4096),
    "noise": (0.0, 100.0),
    "ridge": (0.0, 1.0),
    "condition_cap": (1.0, 1e9),
    "boundary_depth": (0, 1000),
    "boundary_bits": (1, 4),
    "sink_tokens": (0, 128),
}
# Codecs that have bits, and how many.
_BITS = {"pca": (1, 4), "lloyd-max": (1, 4), "uniform": (1, 8), "absmax": (2, 8)}


class RecipeError(ValueError):
    """A recipe that cannot be: says which switch, and what is valid."""


def _check(record: Any) -> None:
    """Every field of a dataclass against CHOICES, RANGES and its annotation."""
    for field in dataclasses.fields(record):
        name, value = field.name, getattr(record, field.name)
        if name in CHOICES and value not in CHOICES[name]:
            raise RecipeError(f"{name} {value!r}; valid: {', '.join(map(str, CHOICES[name]))}")
        if field.type == "bool" and not isinstance(value, bool):
            raise RecipeError(f"{name} {value!r}; valid: true or false")
        if name in RANGES:
            low, high = RANGES[name]
            if value is None and "None" in str(field.type):
                continue
            whole = "int" in str(field.type)
            kinds = int if whole else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "whole numbers" if whole else "numbers"
                raise RecipeError(f"{name} {value!r}; valid: {kind} from {low} to {high}")


@dataclass(frozen=True)
class StreamRecipe:
    """How keys, or values, are coded.

    ``codec`` "pca" is the seed's own (:mod:`.codec`), with all fields up to ``seed``; "lloyd-max",
    "uniform", "absmax" and "fp8" (:mod:`.turboquant`) code every row of a head by itself, with
    ``bits`` and ``norm_correction``; so do "d4" and "e8" (:mod:`.lattice`), with ``q``. "noise"
    adds noise of ``noise`` times the stream's root mean square; "raw" codes nothing.
    """

    codec: str = "pca"
    bits: int = 3
    block_rows: int = 512
    grouping: str = "pooled"
    pca: str = "randomized"
    rank_factor: float = 0.5
    oversample: int = 8
    power_iterations: int = 2
    rank_cap: int | None = None
    variance_ratio: float = 1.0
    clusters: int = 16
    second_clusters: int = 0
    kmeans_iterations: int = 32
    rotation: bool = True
    table: str = "gaussian"
    outlier_threshold: float | None = None
    outlier_budget: float | None = None
    metric: str = "auto"
    residual_norm: str = "restored"
    norm_correction: bool = False
    share_basis: bool = False
    skeleton_dtype: str = "float16"
    seed: int = 0xCAFEBABE
    q: int = 10
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        low, high = _BITS.get(self.codec, RANGES["bits"])
        if not low <= self.bits <= high:
            raise RecipeError(f"bits {self.bits} with codec {self.codec}; valid: {low} to {high}")
        for name in ("clusters", "second_clusters", "block_rows"):
            value = getattr(self, name)
            if value & (value - 1):
                raise RecipeError(f"{name} {value}; valid: powers of two (slots pack choices)")
        if self.second_clusters and not self.clusters:
            raise RecipeError("second_clusters without clusters; valid: clusters of 1 or more")
        if not isinstance(self.table, str) or not (
            self.table in ("gaussian", "calibrated") or self.table.endswith(".f32")
        ):
            raise RecipeError(f"table {self.table!r}; valid: gaussian, calibrated or a .f32 file")
        if self.rank_cap is not None and self.pca != "exact":
            raise RecipeError("rank_cap is of pca exact; valid for randomized: rank_factor")
        if self.outlier_budget is not None and self.outlier_threshold is None:
            raise RecipeError("outlier_budget without outlier_threshold; valid: both or none")
        if self.residual_norm == "unit" and self.metric in ("mse", "linf"):
            raise RecipeError(
                f"residual_norm unit with metric {self.metric}: the seed took lengths for 1 under "
                "inner_product only; valid metrics: auto, inner_product"
            )


@dataclass(frozen=True)
class SeedRecipe:
    """Both streams, and what is decided by layer.

    ``sigma_q``: keys are multiplied by the Cholesky factor of their queries' second moments, with
    ``ridge`` times its mean diagonal added and, with a ``condition_cap``, as much more as holds the
    factor's condition number to it; not in ``sigma_skip_layers``. ``sigma_scale``: "unit" divides
    by the mean diagonal, which changes no code and keeps fields within f16; "raw" does not.
    ``sigma_lags``: "averaged" takes the mean over 2,048 lags of rotary embedding. Uncompressed
    layers: ``boundary_depth`` at either end, with ``boundary_interior`` those at a quarter and at
    half of the depth, and ``boundary_layers``; ``boundary_mode`` "conservative" codes them with
    ``boundary_bits`` instead. ``sink_tokens``: so many first tokens of a sequence are kept
    uncompressed as well, beside their codes; the seed had nothing of this kind.
    """

    name: str
    k: StreamRecipe
    v: StreamRecipe
    sigma_q: bool = False
    ridge: float = 1e-3
    condition_cap: float | None = None
    sigma_skip_layers: tuple[int, ...] = (0,)
    sigma_scale: str = "unit"
    sigma_lags: str = "zero"
    key_position: str = "pre-rope"
    boundary_depth: int = 0
    boundary_interior: bool = False
    boundary_layers: tuple[int, ...] = ()
    boundary_mode: str = "bf16"
    boundary_bits: int = 4
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        _check(self)
        for name in ("sigma_skip_layers", "boundary_layers"):
            layers = getattr(self, name)
            if not isinstance(layers, tuple) or not all(
                isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in layers
            ):
                raise RecipeError(f"{name} {layers!r}; valid: a list of layer numbers from 0")
        if self.boundary_mode == "conservative":
            for stream in (self.k, self.v):
                if stream.codec not in _BITS:
                    raise RecipeError(
                        f"boundary_mode conservative with codec {stream.codec}; valid codecs: "
                        f"{', '.join(_BITS)}"
                    )
        if self.sigma_q and self.key_position != "pre-rope":
            raise RecipeError("sigma_q is of queries before RoPE; valid key_position: pre-rope")

    @property
    def needs_calibration(self) -> bool:
        """Whether an artefact of ``kakeya calibrate --for`` has to be there."""
        tables = any(x.codec == "pca" and x.table == "calibrated" for x in (self.k, self.v))
        return self.sigma_q or tables

    def boundary(self, layers: int) -> set[int]:
        """The layers, of so many, that are boundary layers; RecipeError for one that is none."""
        depth = min(self.boundary_depth, layers)
        found = set(range(depth)) | set(range(layers - depth, layers)) | set(self.boundary_layers)
        if self.boundary_interior:
            found |= {layers // 4, layers // 2}
        if found and max(found) >= layers:
            raise RecipeError(
                f"boundary layer {max(found)} of {layers} layers; valid: 0 to {layers - 1}"
            )
        return found

    def changed(self, name: str, switches: dict[str, Any]) -> SeedRecipe:
        """This recipe under another name with other switches (see the module)."""
        own: dict[str, Any] = {}
        streams: dict[str, dict[str, Any]] = {"k": {}, "v": {}}
        # Those of both streams first: one stream's own switch wins over it.
        for key, value in sorted(switches.items(), key=lambda item: item[0][:2] in ("k_", "v_")):
            if key[:2] in ("k_", "v_") and key[2:] in _STREAM_FIELDS:
                streams[key[0]][key[2:]] = value
            elif key in _STREAM_FIELDS:
                for of in streams.values():
                    of[key] = value
            elif key in _RECIPE_FIELDS:
                own[key] = tuple(value) if isinstance(value, list) else value
            else:
                raise RecipeError(
                    f"unknown switch {key!r}; valid: base, {', '.join(_RECIPE_FIELDS)}; of both "
                    f"streams or with k_ or v_: {', '.join(_STREAM_FIELDS)}"
                )
        parts = {s: dataclasses.replace(getattr(self, s), **of) for s, of in streams.items()}
        return dataclasses.replace(self, name=name, **parts, **own)


_STREAM_FIELDS = tuple(f.name for f in dataclasses.fields(StreamRecipe))
_RECIPE_FIELDS = tuple(
    f.name for f in dataclasses.fields(SeedRecipe) if f.name not in ("name", "k", "v")
)

_BARE = SeedRecipe("v1.3-bare", StreamRecipe(bits=3), StreamRecipe(bits=2, share_basis=True))
_GUARDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("v1.3-sigma", {"sigma_q": True}),
    ("v1.3-tables", {"table": "calibrated"}),
    ("v1.3-boundary", {"boundary_depth": 2, "boundary_interior": True}),
    ("v1.3-ppl", {"k_outlier_threshold": 2.0}),
)
# What the seed's vLLM harnesses ran: bugs B1 and B2.
AS_RUN = {"k_residual_norm": "unit", "variance_ratio": 0.95}
_PER_HEAD = {"grouping": "per-head", "share_basis": False, "kmeans_iterations": 8}
_SNAPA = _PER_HEAD | {
    "k_bits": 4,
    "k_clusters": 64,
    "k_rank_factor": 0.75,
    "boundary_depth": 7,
}


def _presets() -> dict[str, SeedRecipe]:
    found = {_BARE.name: _BARE}
    last = _BARE
    for name, switches in _GUARDS:
        last = found[name] = last.changed(name, switches)
    for name in ("v1.3-bare", "v1.3-ppl"):
        found[f"{name}-as-run"] = found[name].changed(f"{name}-as-run", AS_RUN)
        # One mistake at a time: only the residual's length is restored.
        b2 = {"variance_ratio": 0.95}
        found[f"{name}-vr0.95"] = found[name].changed(f"{name}-vr0.95", b2)
    everywhere = {"boundary_depth": 0, "boundary_interior": False}
    for name, base, switches in (
        ("v1.3-sigma-averaged", "v1.3-sigma", {"sigma_lags": "averaged"}),
        ("v1.3-ppl-no-boundary", "v1.3-ppl", everywhere),
        ("v1.3-ppl-v-outliers", "v1.3-ppl", {"v_outlier_threshold": 2.0}),
    ):
        found[name] = found[base].changed(name, switches)
    others = {
        "v1.3-per-head": _PER_HEAD | {"boundary_depth": 2},
        "v1.3-snapa": _SNAPA,
        "v1.3-snapb": _SNAPA | {"k_clusters": 128},
        "v1.3-snapf": _SNAPA | {"k_clusters": 4, "k_second_clusters": 16},
        "raw": {"codec": "raw"},
    }
    found |= {name: _BARE.changed(name, switches) for name, switches in others.items()}
    for name, (key, value, bits, corrected) in {
        "k8v4": ("fp8", "uniform", (8, 4), False),
        "4bit-nc": ("lloyd-max", "uniform", (4, 4), True),
        "k3v4-nc": ("lloyd-max", "uniform", (3, 4), True),
        "3bit-nc": ("lloyd-max", "uniform", (3, 3), True),
        "tq4": ("lloyd-max", "lloyd-max", (4, 4), False),
        "tq4-nc": ("lloyd-max", "lloyd-max", (4, 4), True),
        "tq3": ("lloyd-max", "lloyd-max", (3, 3), False),
        "tq3-nc": ("lloyd-max", "lloyd-max", (3, 3), True),
        "k4v3-nc": ("lloyd-max", "lloyd-max", (4, 3), True),
    }.items():
        found[f"turboquant-sim-{name}"] = _rows(
            f"turboquant-sim-{name}",
            k_codec=key,
            v_codec=value,
            k_bits=bits[0],
            v_bits=bits[1],
            norm_correction=corrected,
        )
    return found


def _rows(name: str, **switches: Any) -> SeedRecipe:
    """A recipe of rows by themselves: keys as a cache gets them, after RoPE."""
    return _BARE.changed(name, {"share_basis": False, "key_position": "post-rope"} | switches)


PRESETS = _presets()
# After any name but a file's: the first tokens uncompressed.
SINK, SINK_TOKENS = "-sink", 4
# After a name that vLLM can serve: its form in pages (:func:`served`), of blocks of so many rows
# whose side lists have room for so large a share of outliers.
SERVED, SERVED_ROWS, SERVED_BUDGET = "-served", 512, 0.08
# Names with a number: what they are, and the recipe of the number.
FAMILIES: dict[str, tuple[re.Pattern[str], Any]] = {
    "d4-Q": (re.compile(r"d4-(\d+)"), lambda n, q: _rows(n, codec="d4", q=int(q))),
    "e8-Q": (re.compile(r"e8-(\d+)"), lambda n, q: _rows(n, codec="e8", q=int(q))),
    "absmax-B": (re.compile(r"absmax-(\d+)"), lambda n, b: _rows(n, codec="absmax", bits=int(b))),
    "noise-X": (
        re.compile(r"noise-(\d*\.?\d+)"),
        lambda n, x: _rows(n, codec="noise", noise=float(x)),
    ),
}


def names() -> list[str]:
    """Every name that is valid."""
    return [*PRESETS, *FAMILIES, f"any of these with {SINK}", f"those of v1.3 with {SERVED}"]


def served_names() -> list[str]:
    """Presets that have a served form."""
    return [name for name, recipe in PRESETS.items() if not _reasons_not_to_serve(recipe)]


def _reasons_not_to_serve(recipe: SeedRecipe) -> list[str]:
    """What keeps a recipe from pages of one size that stand for themselves; empty if nothing."""
    found = []
    for stream in (recipe.k, recipe.v):
        if stream.codec != "pca":
            found.append(f"codec {stream.codec} has no slots")
            continue
        if stream.variance_ratio < 1:
            found.append(
                f"variance_ratio {stream.variance_ratio} gives every block a rank of its own, and "
                "pages have one size"
            )
        if stream.block_rows != SERVED_ROWS:
            found.append(f"block_rows {stream.block_rows} (valid: {SERVED_ROWS})")
        if stream.norm_correction:
            found.append("norm_correction")
    if recipe.key_position != "pre-rope":
        found.append(f"key_position {recipe.key_position} (valid: pre-rope)")
    if recipe.boundary_mode != "bf16":
        found.append(f"boundary_mode {recipe.boundary_mode} (valid: bf16)")
    if recipe.sink_tokens:
        found.append("a page has no room for uncompressed first tokens")
    return list(dict.fromkeys(found))


def served(recipe: SeedRecipe) -> SeedRecipe:
    """A recipe as pages of vLLM's cache can hold it, under its name and SERVED.

    A page is 512 tokens of one KV head, may be shared by sequences, and has one size: so blocks are
    those of single heads, each with a basis of its own, and lists of outliers have a budget. The
    rest is the recipe's. RecipeError with the reasons if it has no such form.
    """
    reasons = _reasons_not_to_serve(recipe)
    if reasons:
        raise RecipeError(
            f"{recipe.name} cannot be served: {'; '.join(reasons)}. Valid of the seed's are "
            f"{', '.join(served_names())}; `kakeya eval --caches {recipe.name}` simulates this one"
        )
    streams = {}
    for stream in ("k", "v"):
        of = getattr(recipe, stream)
        budget = of.outlier_budget
        if of.outlier_threshold is not None and budget is None:
            budget = SERVED_BUDGET
        streams[stream] = dataclasses.replace(
            of, grouping="per-head", share_basis=False, outlier_budget=budget
        )
    name = recipe.name.removesuffix(SERVED) + SERVED
    return dataclasses.replace(recipe, name=name, **streams)


def find(name: str | None) -> SeedRecipe | None:
    """The recipe of a name or of a JSON file with a "base"; None if it is none of these.

    RecipeError for a file whose base or switches are not valid.
    """
    if name is None:
        return None
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(SINK) and (base := find(name.removesuffix(SINK))):
        return base.changed(name, {"sink_tokens": SINK_TOKENS})
    for pattern, make in FAMILIES.values():
        if found := pattern.fullmatch(name):
            return make(name, found[1])
    if name.endswith(SERVED) and (base := find(name.removesuffix(SERVED))):
        return served(base)
    if not name.endswith(".json") or not Path(name).is_file():
        return None
    return parse(Path(name).read_text("utf-8"), Path(name).stem, name)


def parse(text: str, name: str, source: str) -> SeedRecipe | None:
    """The recipe of a JSON file's ``text``, under ``name`` unless it has a "name" itself; None if
    it is none of ours.

    RecipeError, with ``source``, for a base or switches that are not valid.
    """
    try:
        switches = json.loads(text)
    except ValueError:
        return None  # the plugin says what is wrong with its own recipe files
    if not isinstance(switches, dict) or "base" not in switches:
        return None
    try:
        base = find(switches.pop("base"))
        if base is None:
            raise RecipeError(f"no such base; valid: {', '.join(names())}")
        name = switches.pop("name", name)
        return base.changed(name, switches)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
