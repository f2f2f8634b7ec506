"""What the user chose: recipe, calibration artefact, boundary layers, prefill mode.

Two places: ``KAKEYA_*`` variables and ``--additional-config '{"kakeya": {...}}'``. A value given
in additional_config wins over the variable, because it belongs to this engine while a variable
belongs to the shell. The process that builds the engine resolves everything once and writes the
result back into additional_config, which travels to every worker on every machine.

Everything is checked at start-up and refused with the reason and the valid choices.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kakeya_vllm import lib
from kakeya_vllm.seed import recipe as seed_recipe

KEY = "kakeya"  # additional_config["kakeya"]
PREFILL_MODES = ("raw", "sealed")
FALLBACK_RECIPE = "kakeya-free-4.6x"
DEFAULT_RECIPE = "kakeya-4.6x"
# KAKEYA_CALIBRATION: this word instead of a path makes the artefact if there is none.
AUTO = "auto"
# Of a calibration artefact: `format` in its metadata. The codec asks for the same.
ARTEFACT_FORMAT = "kakeya-calibration-1"
# Bounds of what is read from a file that may come from anyone; the library has the same ones.
MAX_HEADER = 1 << 20  # bytes of an artefact's header; about 1,000 are needed
MAX_ARTEFACT = 1 << 30  # bytes of an artefact; the largest models need 4 MB
MAX_RECIPE = 1 << 16  # bytes of a recipe file

# name -> what it is, in the order of docs/vllm.md.
VARIABLES = {
    "KAKEYA_RECIPE": "preset name or path of a recipe JSON file",
    "KAKEYA_CALIBRATION": "path of a calibration artefact, or auto",
    "KAKEYA_SEED_CALIBRATION": "path of a calibration of the seed's recipes",
    "KAKEYA_BOUNDARY_SKIP_LAYERS": "comma-separated layer numbers that keep the stock cache",
    "KAKEYA_PREFILL": "raw or sealed",
    "KAKEYA_VERIFY": "1: check pages and outputs while serving, slowly",
    "KAKEYA_CACHE": "directory of calibration artefacts",
    "KAKEYA_METRICS_DIR": "set by the API server for its workers (metrics.py)",
    "KAKEYA_LIBRARY": "path of libkakeya.so",
    "KAKEYA_ALLOW_UNTESTED_VLLM": "1: run with a vLLM release that was not tested",
}
_TEST_PREFIX = "KAKEYA_TEST_"  # read by the test suite only
_FIELDS = ("recipe", "calibration", "boundary_skip_layers", "prefill", "verify")


class ConfigError(ValueError):
    """A setting that cannot be used: says which, why, and what is valid."""


@dataclass(frozen=True)
class Settings:
    """Choices of one engine.

    ``recipe``: preset name or recipe JSON; of the seed's, one in its served form (:attr:`seed`).
    ``calibration``: path or None; of a recipe of the seed, of its kind of artefact.
    ``boundary_skip_layers``: sorted layer numbers. ``warnings``: to be logged once at start-up.
    """

    recipe: str
    calibration: str | None
    boundary_skip_layers: tuple[int, ...]
    prefill: str
    warnings: tuple[str, ...] = ()
    verify: bool = False

    @property
    def seed(self) -> seed_recipe.SeedRecipe | None:
        """The served form of a recipe of the seed; None with a recipe of KAKEYA's own."""
        return served_recipe(self.recipe)

    @property
    def block_tokens(self) -> int:
        """Tokens of a page."""
        return lib.BLOCK_TOKENS if self.seed is None else self.seed.k.block_rows

    def to_dict(self) -> dict[str, Any]:
        """The form that additional_config carries to the workers."""
        return {
            "recipe": self.recipe,
            "calibration": self.calibration or "",
            "boundary_skip_layers": list(self.boundary_skip_layers),
            "prefill": self.prefill,
            "verify": self.verify,
        }


def unknown_variables(env: dict[str, str] | None = None) -> list[str]:
    """KAKEYA_* variables that nothing reads: most likely misspelt."""
    env = dict(os.environ) if env is None else env
    return sorted(
        name
        for name in env
        if name.startswith("KAKEYA_")
        and name not in VARIABLES
        and not name.startswith(_TEST_PREFIX)
    )


def parse_layers(value: Any, num_layers: int, source: str) -> tuple[int, ...]:
    """A list of layer numbers, as text ("0, 1,29") or as a list of integers.

    Whitespace is ignored, empty means none. Malformed, negative, duplicated or too large
    numbers raise ConfigError with the valid range.
    """
    valid = f"valid: numbers from 0 to {num_layers - 1}, each once, separated by commas"
    if value is None:
        return ()
    if isinstance(value, str):
        if not value.strip():
            return ()
        items: list[Any] = [item.strip() for item in value.split(",")]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        raise ConfigError(f"{source}={value!r} is not a list of layer numbers; {valid}")
    layers: list[int] = []
    for item in items:
        is_number = isinstance(item, int) and not isinstance(item, bool)
        # No more digits than make sense: Python refuses to read numbers of thousands of them.
        if isinstance(item, str) and re.fullmatch(r"-?[0-9]{1,18}", item):
            item, is_number = int(item), True
        if not is_number:
            raise ConfigError(f"{source}={value!r}: {item!r} is not a layer number; {valid}")
        if item < 0:
            raise ConfigError(f"{source}={value!r}: {item} is negative; {valid}")
        if item >= num_layers:
            raise ConfigError(
                f"{source}={value!r}: layer {item} does not exist, the model has "
                f"{num_layers} layers; {valid}"
            )
        if item in layers:
            raise ConfigError(f"{source}={value!r}: layer {item} is named twice; {valid}")
        layers.append(item)
    return tuple(sorted(layers))


def parse_switch(value: Any, source: str) -> bool:
    """A setting that is on or off: 1 or true, 0 or false (any case), or nothing, which is off."""
    if value is None or isinstance(value, bool):
        return bool(value)
    words = {"": False, "0": False, "false": False, "1": True, "true": True}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ConfigError(f"{source}={value!r}; valid: 1 or 0")


def cache_dir(env: dict[str, str] | None = None) -> Path:
    """Where artefacts lie: KAKEYA_CACHE, else $XDG_CACHE_HOME/kakeya, else ~/.cache/kakeya."""
    env = dict(os.environ) if env is None else env
    if env.get("KAKEYA_CACHE"):
        return Path(env["KAKEYA_CACHE"])
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kakeya"


def expanded(value: str, source: str) -> Path:
    """A path of a setting, ~ and ~user replaced; ConfigError for a user who does not exist."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{source}={value!r}: {error}") from error


def is_file(path: Path, source: str) -> bool:
    """Whether a path of a setting is a file; ConfigError where not even that can be told (a name
    that is too long, a directory that may not be searched)."""
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigError(f"{source}: {str(path)!r} cannot be looked at: {error}") from error


def default_calibration_path(fingerprint: str, env: dict[str, str] | None = None) -> Path:
    """Where `kakeya calibrate` puts a model's artefact when it is not told."""
    return cache_dir(env) / "calibration" / f"{fingerprint}.safetensors"


def read_recipe(value: str, source: str = "KAKEYA_RECIPE") -> str:
    """A preset name, or the text of a recipe file: a value with '/' or ending in .json is a path.

    The text is not judged here; the library knows what a recipe may say.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # of a variable with bytes that are no text
        raise ConfigError(f"{source}={value!r} is not text: {error}") from error
    if value.lstrip().startswith("{"):
        return value
    if "/" not in value and not value.endswith(".json"):
        return value
    try:
        path = Path(value).expanduser()
        if path.exists() and not path.is_file():  # reading a device or a pipe may never end
            raise OSError("it is not a regular file")
        if (size := path.stat().st_size) > MAX_RECIPE:
            raise OSError(f"it has {size} bytes; valid: up to {MAX_RECIPE}")
        return path.read_text("utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot read the recipe file {value!r}: {error}") from error


def served_recipe(recipe: str, source: str = "KAKEYA_RECIPE") -> seed_recipe.SeedRecipe | None:
    """The served form of a recipe of the seed, from its name or JSON; None for any other recipe.

    ConfigError for one that cannot be served, or cannot be.
    """
    try:
        if not recipe.lstrip().startswith("{"):
            found = seed_recipe.find(recipe)
        elif _is_of_the_seed(recipe):
            found = seed_recipe.parse(recipe, "from a file", "the recipe file")
        else:
            found = None
        return None if found is None else seed_recipe.served(found)
    except seed_recipe.RecipeError as error:
        raise ConfigError(f"{source}: {error}") from error


def _is_of_the_seed(text: str) -> bool:
    """Whether a recipe file changes a recipe of the seed: KAKEYA's own have a "base" as well."""
    try:
        base = json.loads(text).get("base")
    except (ValueError, AttributeError, RecursionError):
        return False
    return isinstance(base, str) and seed_recipe.find(base) is not None


def chosen_seed(
    additional: Any, env: dict[str, str] | None = None
) -> seed_recipe.SeedRecipe | None:
    """The served form of the recipe of the seed that was chosen, if one was."""
    env = dict(os.environ) if env is None else env
    value = _section(additional).get("recipe") or env.get("KAKEYA_RECIPE") or ""
    return served_recipe(read_recipe(value.strip()))


def resolve(
    additional: Any,
    model_config: Any,
    env: dict[str, str] | None = None,
    calibrate: Callable[[Path, str], None] | None = None,
) -> Settings:
    """Settings of an engine from ``vllm_config.additional_config`` and the environment.

    ``model_config`` is vLLM's. ``calibrate(path, fingerprint)`` makes an artefact where calibration
    is "auto" and the model has none; it is called after everything else was found to be valid.
    Raises ConfigError; says in ``warnings`` what was assumed.
    """
    env = dict(os.environ) if env is None else env
    chosen = _section(additional)
    sources = {
        "recipe": "KAKEYA_RECIPE",
        "calibration": "KAKEYA_CALIBRATION",
        "boundary_skip_layers": "KAKEYA_BOUNDARY_SKIP_LAYERS",
        "prefill": "KAKEYA_PREFILL",
        "verify": "KAKEYA_VERIFY",
    }
    values: dict[str, Any] = {}
    for field, variable in sources.items():
        if chosen.get(field) is not None:
            values[field] = chosen[field]
            sources[field] = f'additional_config["{KEY}"]["{field}"]'
        else:
            values[field] = env.get(variable)

    num_layers = model_config.get_total_num_hidden_layers()
    layers = parse_layers(
        values["boundary_skip_layers"], num_layers, sources["boundary_skip_layers"]
    )
    prefill = (values["prefill"] or "raw").strip().lower()
    if prefill not in PREFILL_MODES:
        raise ConfigError(
            f"{sources['prefill']}={values['prefill']!r}; valid: {' or '.join(PREFILL_MODES)}"
        )
    verify = parse_switch(values["verify"], sources["verify"])
    text = read_recipe((values["recipe"] or "").strip(), sources["recipe"])
    seed = served_recipe(text, sources["recipe"])
    if seed is not None:
        if prefill != "raw":
            raise ConfigError(
                f"{sources['prefill']}={values['prefill']!r} with recipe {seed.name}, one of the "
                "seed's; valid: raw"
            )
        try:
            layers = tuple(sorted({*layers, *seed.boundary(num_layers)}))
        except seed_recipe.RecipeError as error:
            raise ConfigError(f"{sources['recipe']}: {error}") from error
        calibration, warnings = _seed_calibration(
            seed, chosen.get("calibration"), model_config, env
        )
        if text != seed.name:
            warnings = (_served_warning(text, seed), *warnings)
        recipe = text if text.lstrip().startswith("{") else seed.name
        return Settings(recipe, calibration, layers, prefill, warnings, verify)
    recipe, calibration, warnings = _recipe_and_calibration(
        values, sources, model_config, env, calibrate
    )
    return Settings(recipe, calibration, layers, prefill, warnings, verify)


def _served_warning(text: str, seed: seed_recipe.SeedRecipe) -> str:
    """That the served form of a recipe of the seed is not what its name, or file, says."""
    budgets = {x.outlier_budget for x in (seed.k, seed.v)} - {None}
    room = f", and room for {max(budgets):.0%} of outliers" if budgets else ""
    return (
        f"recipe {_short(text)} is served in its form for pages, {seed.name}: blocks of "
        f"{seed_recipe.SERVED_ROWS} tokens of single heads, each with a basis of its own{room}"
    )


def _seed_calibration(
    seed: seed_recipe.SeedRecipe, chosen: str | None, model_config: Any, env: dict[str, str]
) -> tuple[str | None, tuple[str, ...]]:
    """Path of the artefact that a recipe of the seed needs, and warnings. ``chosen``: what
    additional_config names; KAKEYA_CALIBRATION is of KAKEYA's own recipes."""
    from kakeya_vllm.seed import calibration

    warnings: tuple[str, ...] = ()
    if env.get("KAKEYA_CALIBRATION") and chosen is None:
        warnings = (
            f"KAKEYA_CALIBRATION is not used: recipe {seed.name} takes {calibration.VARIABLE}",
        )
    if not seed.needs_calibration:
        return None, warnings
    fingerprint = model_fingerprint(model_config.hf_text_config)
    try:
        path = calibration.find_path(
            seed, getattr(model_config, "model", "MODEL"), fingerprint, chosen, env
        )
    except calibration.CalibrationError as error:
        raise ConfigError(str(error)) from error
    check_metadata(path, fingerprint, calibration.FORMAT)
    return str(path), warnings


def _section(additional: Any) -> dict[str, Any]:
    if not isinstance(additional, dict):
        return {}
    chosen = additional.get(KEY) or {}
    if not isinstance(chosen, dict):
        raise ConfigError(
            f'additional_config["{KEY}"] must be an object with {", ".join(_FIELDS)}; '
            f"it is {chosen!r}"
        )
    unknown = sorted(set(chosen) - set(_FIELDS))
    if unknown:
        raise ConfigError(
            f'additional_config["{KEY}"] has unknown fields {", ".join(unknown)}; '
            f"valid: {', '.join(_FIELDS)}"
        )
    for field in ("recipe", "calibration", "prefill"):
        if chosen.get(field) is not None and not isinstance(chosen[field], str):
            raise ConfigError(f'additional_config["{KEY}"]["{field}"] must be a string')
    return chosen


def _recipe_and_calibration(
    values: dict[str, Any],
    sources: dict[str, str],
    model_config: Any,
    env: dict[str, str],
    calibrate: Callable[[Path, str], None] | None,
) -> tuple[str, str | None, tuple[str, ...]]:
    library = lib.load()
    model = getattr(model_config, "model", "MODEL")
    fingerprint = model_fingerprint(model_config.hf_text_config)
    default_path = default_calibration_path(fingerprint, env)
    auto = (values["calibration"] or "").strip().lower() == AUTO

    path: Path | None = None
    if values["calibration"] and not auto:
        path = expanded(values["calibration"], sources["calibration"])
        if not is_file(path, sources["calibration"]):
            raise ConfigError(
                f"{sources['calibration']}={values['calibration']!r} is not a file; valid: a path, "
                f"{AUTO}, or nothing"
            )
    elif auto or (values["calibration"] is None and is_file(default_path, "KAKEYA_CACHE")):
        # An empty string is a choice of its own: no artefact, wherever one may lie.
        path = default_path

    warnings: tuple[str, ...] = ()
    if values["recipe"]:
        recipe = read_recipe(values["recipe"].strip(), sources["recipe"])
    elif path is not None:
        recipe = DEFAULT_RECIPE
    else:
        recipe = FALLBACK_RECIPE
        warnings = (
            f"no calibration artefact for this model: using {FALLBACK_RECIPE}, which is "
            f"calibration-free and less accurate. `kakeya calibrate {model}` makes one "
            f"at {default_path}; KAKEYA_CALIBRATION={AUTO} does so at start-up",
        )
    try:
        needs_calibration = bool(library.recipe_describe(recipe)["needs_calibration"])
    except lib.KakeyaError as error:
        raise ConfigError(f"{sources['recipe']}: {error.text}") from error  # lists the presets
    if needs_calibration and path is None:
        raise ConfigError(
            f"recipe {_short(recipe)} needs a calibration artefact and there is none at "
            f"{default_path}. Make one with `kakeya calibrate {model}`, or at start-up with "
            f"KAKEYA_CALIBRATION={AUTO}, name one with KAKEYA_CALIBRATION, or choose a "
            f"calibration-free recipe such as {FALLBACK_RECIPE}"
        )
    if not needs_calibration:
        if values["calibration"]:
            what = f"{sources['calibration']}={AUTO}" if auto else path
            warnings += (f"recipe {_short(recipe)} takes no calibration: {what} is not used",)
        path = None
    if path is not None:
        if auto and not is_file(path, "KAKEYA_CACHE"):
            if calibrate is None:
                raise ConfigError(
                    f"{sources['calibration']}={AUTO}: there is no artefact at {path} yet, and "
                    "only an engine with the KAKEYA backend makes one. Run "
                    f"`kakeya calibrate {model}`"
                )
            calibrate(path, fingerprint)
        check_metadata(path, fingerprint)
    return recipe, None if path is None else str(path), warnings


def _short(recipe: str) -> str:
    """A recipe's name for messages; a recipe given as JSON may carry one."""
    if not recipe.lstrip().startswith("{"):
        return recipe
    try:
        return str(json.loads(recipe).get("name", "from a file"))
    except (ValueError, AttributeError, RecursionError):
        return "from a file"


# ---------------------------------------------------------------------------------------------
# Which model an artefact was made for.

# Config fields that determine the shape and the distribution of K and V. Weights are not hashed:
# a fine-tune of the same architecture may use its base's artefact, at the user's choice.
_MODEL_FIELDS = (
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "attention_bias",
    "qkv_bias",
    "use_qk_norm",
    "qk_layernorm",
)


def model_fingerprint(hf_config: Any) -> str:
    """64 hex digits that identify a model's K and V, from a Hugging Face config (or a dict).

    SHA-256 over the canonical JSON of ``_MODEL_FIELDS`` and the rotary parameters. Spellings that
    mean the same (rope_theta and rope_scaling, or rope_parameters) give the same fingerprint, so
    it does not depend on the Transformers release that read the config.
    """
    fields = {name: _get(hf_config, name) for name in _MODEL_FIELDS}
    heads = fields["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None and heads:
        fields["head_dim"] = fields["hidden_size"] // heads
    for flag in ("attention_bias", "qkv_bias", "use_qk_norm", "qk_layernorm"):
        fields[flag] = bool(fields[flag])
    fields["rope"] = _rope_fields(hf_config)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _get(config: Any, name: str) -> Any:
    value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return list(value) if isinstance(value, tuple) else value


def _rope_fields(config: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope.update({k: v for k, v in (_get(config, name) or {}).items() if v is not None})
    legacy_type = rope.pop("type", None)
    rope.setdefault("rope_type", legacy_type or "default")
    for name in ("rope_theta", "partial_rotary_factor"):
        if name not in rope and _get(config, name) is not None:
            rope[name] = _get(config, name)
    # 1.0 and absent mean the same; integers and floats of one value compare equal as floats.
    if rope.get("partial_rotary_factor") in (1, 1.0):
        del rope["partial_rotary_factor"]
    return {k: _number(v) for k, v in rope.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def read_artefact(path: str | Path) -> bytes:
    """The bytes of an artefact; ConfigError for a file that is larger than any."""
    path = Path(path)
    if (size := path.stat().st_size) > MAX_ARTEFACT:
        raise ConfigError(f"{path} cannot be used: {size} bytes; valid: up to {MAX_ARTEFACT}")
    return path.read_bytes()


def read_metadata(path: str | Path) -> dict[str, str]:
    """The ``__metadata__`` strings of a safetensors file; reads only its header."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER:
                raise ValueError(f"a header of {size} bytes; valid: 2 to {MAX_HEADER}")
            header = json.loads(file.read(size))
            metadata = header.get("__metadata__") or {}
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is not an object")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error
    return metadata


def check_metadata(path: str | Path, fingerprint: str, file_format: str = ARTEFACT_FORMAT) -> None:
    """Refuse what is no artefact, or one of another format, or one made for another model."""
    metadata = read_metadata(path)
    found = metadata.get("model_fingerprint")
    if found is None:
        raise ConfigError(
            f"{path} is not a calibration artefact of KAKEYA: its metadata has no model_fingerprint"
        )
    if metadata.get("format") != file_format:
        raise ConfigError(
            f"{path} has the format {metadata.get('format')}, this version of KAKEYA reads "
            f"{file_format}: calibrate the model again"
        )
    if found != fingerprint:
        raise ConfigError(
            f"{path} was calibrated for another model: its model fingerprint is {found}, "
            f"this model's is {fingerprint}"
        )


# ---------------------------------------------------------------------------------------------
# The settings of the engine that is being built in this process.

_current: Settings | None = None


def activate(settings: Settings) -> None:
    """Make ``settings`` those of the engine whose layers are being built.

    AttentionBackend.customize_spec is a class method that vLLM calls with a spec and nothing
    else, so the recipe has to be found here. Engines are built one after the other, so the last
    one activated is the one whose specs are asked for.
    """
    global _current
    _current = settings


def current() -> Settings:
    """The settings made current by :func:`activate`."""
    if _current is None:
        raise RuntimeError("KAKEYA was asked for a page size before an attention layer was built")
    return _current


def from_vllm(vllm_config: Any) -> Settings:
    """Resolve the settings of an engine and make them current."""
    settings = resolve(vllm_config.additional_config, vllm_config.model_config)
    activate(settings)
    return settings
