"""The model's own rotary embedding, for the codec.

Keys arrive rotated; the codec turns them back by position before it quantises them, so it has to
rotate by exactly the angles that the model uses. They are taken from the loaded model and nothing
is inferred from config names: the rotary module of a layer is the one held by the nearest module
around the layer's Attention. Its frequencies come from its own ``_compute_inv_freq`` and are then
checked against its ``cos_sin_cache``, which is what the model really multiplies with.

(vLLM's ``_ROPE_DICT`` was not used: it holds every rotary module of the process, also those of
other engines and of a vision tower.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kakeya_vllm.support import UnsupportedFeature


@dataclass(frozen=True)
class Rope:
    """Angles of one model: ``inv_freq`` has rotary_dim / 2 entries, radians a position."""

    rotary_dim: int
    interleaved: bool
    inv_freq: tuple[float, ...]
    mscale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """The form kakeya_codec_new takes. A constant scale of K is no concern of the codec."""
        return {
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
            "inv_freq": list(self.inv_freq),
        }


def find(model: torch.nn.Module, layer_names: list[str], hf_config: Any) -> Rope | None:
    """The one rotary embedding of the named attention layers; None if the model has none.

    Raises UnsupportedFeature if layers differ, if the kind is not one with fixed angles, or if a
    model that should rotate shows no rotary module.
    """
    modules = dict(model.named_modules())
    # A layer's name is mostly its place in the model, and not always (Falcon-H1).
    places = {getattr(module, "layer_name", None): path for path, module in modules.items()}
    found: dict[str, torch.nn.Module | None] = {
        name: _nearest_rotary(modules, places.get(name, name)) for name in layer_names
    }
    distinct = {id(module): module for module in found.values() if module is not None}
    if not distinct:
        if _declares_rope(hf_config) or any(_is_rotary(module) for module in modules.values()):
            raise UnsupportedFeature(
                ["a model whose rotary embedding is not beside its attention layers"]
            )
        return None
    without = [name for name, module in found.items() if module is None]
    if without or _skips_rope(hf_config):
        example = f" ({without[0]} does not)" if without else ""
        raise UnsupportedFeature([f"models that rotate only some layers{example}"])
    ropes = {extract(module) for module in distinct.values()}
    if len(ropes) > 1:
        raise UnsupportedFeature(["several different rotary embeddings on compressed layers"])
    return ropes.pop()


def extract(module: Any) -> Rope:
    """Angles of one vLLM rotary module, verified against its table of cosines and sines."""
    kind = type(module).__name__
    mscale = 1.0
    # Exact class names: a subclass may compute something else. Each of these turns position p by
    # p * inv_freq, with one table for all sequence lengths.
    if kind in ("RotaryEmbedding", "Llama3RotaryEmbedding", "NTKScalingRotaryEmbedding"):
        inv_freq = module._compute_inv_freq(module.base)
    elif kind == "LinearScalingRotaryEmbedding":
        factors = module.scaling_factors
        factors = factors if isinstance(factors, list | tuple) else [factors]
        if len(factors) != 1:
            raise UnsupportedFeature([f"rotary embedding {kind} with several scaling factors"])
        inv_freq = module._compute_inv_freq(module.base).double() / factors[0]
    elif kind == "YaRNScalingRotaryEmbedding":
        inv_freq = module._compute_inv_freq(module.scaling_factor)
        mscale = float(module.mscale)
    else:
        reason = {
            "DynamicNTKScalingRotaryEmbedding": "its angles depend on the sequence length",
            "DynamicNTKAlphaRotaryEmbedding": "its angles depend on the sequence length",
            "Phi3LongRoPEScaledRotaryEmbedding": "longrope switches angles by sequence length",
            "MRotaryEmbedding": "M-RoPE has several positions a token",
        }.get(kind, "only embeddings with fixed angles are known")
        raise UnsupportedFeature([f"rotary embedding {kind} ({reason})"])
    rope = Rope(
        rotary_dim=int(module.rotary_dim),
        interleaved=not module.is_neox_style,
        inv_freq=tuple(inv_freq.double().flatten().tolist()),
        mscale=mscale,
    )
    _verify(rope, module.cos_sin_cache, kind)
    return rope


def _verify(rope: Rope, cache: torch.Tensor, kind: str) -> None:
    """Compare angles with the table [positions, rotary_dim] = [cos | sin] at sampled positions."""
    if len(rope.inv_freq) * 2 != rope.rotary_dim or cache.shape[-1] != rope.rotary_dim:
        raise UnsupportedFeature([f"rotary embedding {kind} of {cache.shape[-1]} channels"])
    count = cache.shape[0]
    steps = {0, 1, 2, 3, 17, 127, 128, 1000, count // 3, count // 2, count - 1}
    positions = torch.tensor(sorted(p for p in steps if p < count), dtype=torch.float64)
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64)
    angles = positions[:, None] * inv_freq
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.mscale
    table = cache[positions.long().to(cache.device)].double().cpu()
    # The table was computed from float32 angles (an error of p * inv_freq * 2^-23, twice for the
    # product) and rounded to its own dtype.
    rounding = torch.finfo(cache.dtype).eps
    tolerance = rope.mscale * (rounding + torch.cat((angles, angles), -1).abs() * 2.0**-22) + 1e-6
    error = (table - expected).abs() - tolerance
    if not bool((error <= 0).all()) or not math.isfinite(float(table.sum())):
        row = int(error.amax(-1).argmax())
        raise UnsupportedFeature(
            [
                f"rotary embedding {kind}: its table does not follow its own frequencies "
                f"(position {int(positions[row])})"
            ]
        )


def _is_rotary(module: Any) -> bool:
    return hasattr(module, "rotary_dim") and (
        hasattr(module, "cos_sin_cache") or hasattr(module, "long_short_cos_sin_cache")
    )


def _nearest_rotary(modules: dict[str, Any], layer_name: str) -> Any:
    """The rotary module held by the nearest module around ``layer_name``, or None.

    Looks at direct children through ``_modules``: rotary modules are shared between layers, and
    named_modules() lists a shared module only under its first name.
    """
    parts = layer_name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        holder = modules.get(".".join(parts[:depth]))
        if holder is None:
            continue
        held = {id(m): m for m in holder._modules.values() if m is not None and _is_rotary(m)}
        if len(held) > 1:
            raise UnsupportedFeature([f"several rotary embeddings in {'.'.join(parts[:depth])}"])
        if held:
            return next(iter(held.values()))
    return None


def _declares_rope(hf_config: Any) -> bool:
    return any(
        getattr(hf_config, name, None)
        for name in ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct")
    )


def _skips_rope(hf_config: Any) -> bool:
    """Models that hold a rotary module in every layer and do not apply it in some."""
    flags = getattr(hf_config, "no_rope_layers", None)  # 1 = rotate, 0 = do not
    return bool(flags) and not all(flags)
