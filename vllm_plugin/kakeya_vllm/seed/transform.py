"""Signed Walsh-Hadamard transform: spreads a row evenly over its coordinates."""

from __future__ import annotations

import functools

import torch


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x over the last axis, natural order, not normalised: H H = L.

    ``x`` [..., L], L a power of two (else ValueError). Additions only, in an order that does not
    depend on the other axes, so a row alone gives the bits that it gives in a batch.
    """
    length = x.shape[-1]
    if length & (length - 1) or not length:
        raise ValueError(f"length {length} is not a power of two")
    shape, step = x.shape, 1
    while step < length:
        pairs = x.reshape(*shape[:-1], length // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2).reshape(shape)
        step *= 2
    return x


@functools.lru_cache(maxsize=64)
def signs(length: int, seed: int, device: torch.device) -> torch.Tensor:
    """Float32 [length] of +1 and -1, a function of ``seed`` alone on every device."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (length,), generator=generator)
    return (bits * 2 - 1).float().to(device)


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """H (s * x) over the last axis; squared norms grow by its length."""
    return walsh_hadamard(x * signs(x.shape[-1], seed, x.device))


def unrotate(y: torch.Tensor, seed: int) -> torch.Tensor:
    """The inverse of :func:`rotate`."""
    length = y.shape[-1]
    return walsh_hadamard(y) * (signs(length, seed, y.device) / length)
