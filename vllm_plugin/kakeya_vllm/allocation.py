"""Memory that KAKEYA itself takes, and what is said where there is none.

torch's own message names bytes; a user has to know what they are for and which setting changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class OutOfMemory(RuntimeError):
    """No memory for something of KAKEYA's: says for what, how much, and what to change."""


@contextlib.contextmanager
def allocating(what: str, nbytes: int, advice: str) -> Iterator[None]:
    """For the length of a with block, a refusal of memory becomes an OutOfMemory that says it.

    ``what`` is allocated, ``nbytes`` bytes; ``advice``: how to need less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        raise OutOfMemory(
            f"there is no memory for {what} ({nbytes / 2**20:,.0f} MiB): {advice}. {error}"
        ) from error


def is_refusal(error: BaseException) -> bool:
    """Whether an error of an allocation is about memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    text = str(error)
    return "DefaultCPUAllocator" in text or "Storage size calculation overflowed" in text
