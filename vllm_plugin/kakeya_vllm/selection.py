"""Ways to select KAKEYA that vLLM does not have itself: a variable, and a name of a KV-cache dtype.

Both only write what --attention-backend and --additional-config would have said into EngineArgs.
"""

from __future__ import annotations

import os
from typing import Any

from kakeya_vllm import register


def by_environment(engine_args: Any) -> None:
    """VLLM_ATTENTION_BACKEND, where no flag chooses a backend; a warning for other values."""
    from vllm.logger import init_logger

    value = os.environ.get(register.ENV_BACKEND, "").strip()
    if not value:
        return
    if not register.selected_by_environment():
        init_logger("vllm.kakeya").warning_once(
            "%s=%s has no effect: vLLM no longer reads this variable and the KAKEYA plugin only "
            "answers to %s. Use --attention-backend",
            register.ENV_BACKEND,
            value,
            register.NAME,
        )
    elif _chosen_backend(engine_args) is None:
        engine_args.attention_backend = register.NAME


def by_cache_dtype(engine_args: Any) -> None:
    """--kv-cache-dtype kakeya, or the name of a preset, such as kakeya-5.3x: backend and recipe.

    For vLLM the dtype is "auto" then. So the name need not be registered with vLLM
    (register_kv_cache_dtype, from 0.33 on), which would have to happen in every process before it
    unpickles its configuration. ConfigError for an unknown preset and where options contradict.
    """
    from kakeya_vllm import config, lib

    name = str(engine_args.kv_cache_dtype).strip().lower()
    if not name.startswith(register.NAME.lower()):
        return
    source = f"kv_cache_dtype {name}"
    backend = _chosen_backend(engine_args)
    if backend is not None and not register.is_ours(backend):
        raise config.ConfigError(
            f"{source} is served by the attention backend {register.NAME}, and attention_backend "
            f"is {getattr(backend, 'name', backend)}; valid: one of the two"
        )
    if name != register.NAME.lower():
        try:
            lib.load().recipe_describe(name)
        except lib.KakeyaError as error:
            raise config.ConfigError(f"{source}: {error.text}") from error  # lists the presets
        engine_args.additional_config = _with_recipe(engine_args.additional_config, name, source)
    engine_args.attention_backend = register.NAME
    engine_args.kv_cache_dtype = "auto"


def _chosen_backend(engine_args: Any) -> Any:
    return engine_args.attention_backend or engine_args.attention_config.backend


def _with_recipe(additional: Any, recipe: str, source: str) -> dict[str, Any]:
    """additional_config with the recipe in it."""
    from kakeya_vllm import config

    chosen = additional.get(config.KEY) or {} if isinstance(additional, dict) else None
    if not isinstance(chosen, dict):
        raise config.ConfigError(
            f"{source} needs an object in additional_config[{config.KEY!r}], or nothing"
        )
    if chosen.get("recipe") not in (None, recipe):
        raise config.ConfigError(
            f"{source}, and additional_config[{config.KEY!r}]['recipe'] is {chosen['recipe']!r}; "
            "valid: one of the two"
        )
    return {**additional, config.KEY: {**chosen, "recipe": recipe}}
