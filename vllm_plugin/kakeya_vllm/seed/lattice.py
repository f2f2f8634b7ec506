"""D4 and E8: closest points, and codes of rows scaled to their largest coordinate.

D_n is the integer points with an even sum; E8 is D8 together with D8 + 1/2. Closest points after
Conway and Sloane, "Fast quantizing and decoding algorithms for lattice quantizers and codes", 1982.
"""

from __future__ import annotations

import math

import torch

from kakeya_vllm.seed.transform import rotate, unrotate

DIMENSION = {"d4": 4, "e8": 8}


def closest_dn(x: torch.Tensor, low: float = -math.inf, high: float = math.inf) -> torch.Tensor:
    """The point of D_n nearest to each ``x`` [..., n] with coordinates from ``low`` to ``high``
    (whole numbers): every coordinate rounded and, if their sum is odd, one of them moved by one,
    the one that this costs least."""
    near = x.round().clamp(low, high)
    error = x - near
    step = torch.where(error < 0, -1.0, 1.0).to(x.dtype)
    step = torch.where((near + step < low) | (near + step > high), -step, step)
    # Moving by the step changes the squared error by 1 - 2 error step.
    cheapest = (error * step).argmax(-1, keepdim=True)
    odd = near.sum(-1, keepdim=True).remainder(2).to(x.dtype)
    return near.scatter_add(-1, cheapest, step.gather(-1, cheapest) * odd)


def closest_e8(x: torch.Tensor, low: float = -math.inf, high: float = math.inf) -> torch.Tensor:
    """The point of E8 nearest to each ``x`` [..., 8] with coordinates from ``low`` to ``high``."""
    whole = closest_dn(x, low, high)
    half = closest_dn(x - 0.5, low, high - 1) + 0.5
    nearer = (x - half).square().sum(-1, keepdim=True) < (x - whole).square().sum(-1, keepdim=True)
    return torch.where(nearer, half, whole)


CLOSEST = {"d4": closest_dn, "e8": closest_e8}


def bits_per_row(lattice: str, q: int, dim: int) -> int:
    """Of a row of ``dim`` coordinates: codes of the points in [-q, q] and two f16 (norm, largest
    coordinate). A D4 point's last parity bit is known, so it saves one."""
    block = DIMENSION[lattice]
    free = block * math.log2(2 * q + 1) - (lattice == "d4")
    return dim // block * math.ceil(free) + 32


def round_trip(x: torch.Tensor, lattice: str, q: int, seed: int) -> torch.Tensor:
    """Rows [..., D] as their codes give them back: unit length, rotated, the largest coordinate at
    ``q``, the nearest lattice point in [-q, q] of every 4 or 8 coordinates. (The seed cut points to
    the box after choosing them, which leaves some outside of the lattice and without a code.)"""
    block = DIMENSION[lattice]
    norm = x.norm(dim=-1, keepdim=True).half().float()
    y = rotate(x / norm.clamp_min(1e-30), seed) / x.shape[-1] ** 0.5
    largest = y.abs().amax(-1, keepdim=True).half().float().clamp_min(2.0**-14)
    points = CLOSEST[lattice]((y * (q / largest)).unflatten(-1, (-1, block)), -q, q)
    y = points.flatten(-2) * (largest / q)
    return unrotate(y * x.shape[-1] ** 0.5, seed) * norm
