"""Which vLLM releases the plugin was run with, and what happens with any other.

vLLM's attention interface is internal and moves with every release; an untested one could accept
the plugin and compute something else. So it is refused by number, and one variable says otherwise.
"""

from __future__ import annotations

import os

SUPPORTED = ((0, 32), (0, 33))
SUPPORTED_TEXT = "0.32.x and 0.33.x"
SUPPORTED_ON_GPU = ((0, 33),)
OVERRIDE = "KAKEYA_ALLOW_UNTESTED_VLLM"


class UnsupportedVllm(RuntimeError):
    """The installed vLLM is outside the supported range."""


def installed() -> str:
    """vLLM's own version string, e.g. ``0.32.0+cpu``."""
    import vllm

    return vllm.__version__


def is_supported(version: str, releases: tuple[tuple[int, int], ...] = SUPPORTED) -> bool:
    """Whether ``version`` (PEP 440) is in the supported range; unreadable versions are not."""
    from packaging.version import InvalidVersion, Version

    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    return parsed.release[:2] in releases


def allowed(version: str | None = None) -> bool:
    """Whether the plugin may run: a supported release, or the override is set."""
    version = installed() if version is None else version
    return is_supported(version) or os.environ.get(OVERRIDE) == "1"


def allowed_on_gpu(version: str | None = None) -> bool:
    """The same for vLLM's CUDA platform, where fewer releases were tried."""
    version = installed() if version is None else version
    return is_supported(version, SUPPORTED_ON_GPU) or os.environ.get(OVERRIDE) == "1"


def require(version: str | None = None) -> None:
    """Raise UnsupportedVllm with the supported range unless :func:`allowed`."""
    version = installed() if version is None else version
    if not allowed(version):
        raise UnsupportedVllm(
            f"KAKEYA supports vLLM {SUPPORTED_TEXT}; {version} is installed. Install one of "
            f"those, or set {OVERRIDE}=1 to try this one at your own risk"
        )
