"""The entry point: makes vLLM know the name KAKEYA.

vLLM calls :func:`register` once in every process (API server, engine core, workers), in every
vLLM run, whether KAKEYA is used or not. So it does little: an alias in an enum and hooks that run
when vLLM imports certain modules (patches.py). Errors are raised only when KAKEYA is selected.

The name is an alias of ``AttentionBackendEnum.CUSTOM``. vLLM can also make a new enum member, but
a spawned process unpickles its VllmConfig before it loads plugins and does not know that member
(``ValueError: '...' is not a valid AttentionBackendEnum``); CUSTOM unpickles everywhere.
"""

from __future__ import annotations

import os
from typing import Any

from kakeya_vllm import version

NAME = "KAKEYA"
BACKEND_PATH = "kakeya_vllm.backend.KakeyaBackend"
ENV_BACKEND = "VLLM_ATTENTION_BACKEND"


class RegistrationError(RuntimeError):
    """The name cannot be given to KAKEYA in this process."""


def register() -> None:
    """Make KAKEYA selectable. Cheap; calling it again does nothing new."""
    try:
        supported = version.allowed()
        _add_alias()
    except Exception:
        # An unknown vLLM may lack what the alias needs. That concerns nobody who did not ask.
        if selected_by_environment():
            version.require()
            raise
        return
    from kakeya_vllm import patches

    patches.install(all_patches=supported)


def selected_by_environment() -> bool:
    """Whether VLLM_ATTENTION_BACKEND names KAKEYA, in any case."""
    return os.environ.get(ENV_BACKEND, "").strip().upper() == NAME


def _add_alias() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    member = AttentionBackendEnum.CUSTOM
    owner = custom_owner()
    if owner is None:
        register_backend(member, BACKEND_PATH)
    elif owner != BACKEND_PATH:
        # Another plugin's choice stands; KAKEYA is refused when somebody selects it.
        if selected_by_environment():
            require_ownership()
        return
    AttentionBackendEnum._member_map_.setdefault(NAME, member)


def custom_owner() -> str | None:
    """Class path that CUSTOM stands for in this process, or None."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.CUSTOM
    return member.get_path() if member.is_overridden() else None


def require_ownership() -> None:
    """Raise unless CUSTOM, the member that KAKEYA is an alias of, is ours."""
    owner = custom_owner()
    if owner != BACKEND_PATH:
        raise RegistrationError(
            "KAKEYA needs vLLM's attention backend CUSTOM, which belongs to "
            f"{owner or 'nobody'} in this process. Disable the other plugin, for example with "
            "VLLM_PLUGINS=kakeya"
        )


def is_ours(backend: Any) -> bool:
    """Whether a value of AttentionConfig.backend (enum member, name or None) means KAKEYA."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if isinstance(backend, str):
        return backend.strip().upper() == NAME
    return backend is AttentionBackendEnum.CUSTOM and custom_owner() == BACKEND_PATH


def is_selected(vllm_config: Any) -> bool:
    """Whether an engine uses KAKEYA for all layers or for one kind of them."""
    attention = vllm_config.attention_config
    return is_ours(attention.backend) or any(
        is_ours(backend) for backend in (attention.backend_per_kind or {}).values()
    )
