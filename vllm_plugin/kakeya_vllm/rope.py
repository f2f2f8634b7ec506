"""The model's own rotary embedding, for the codec.

Keys arrive rotated; the codec turns them back by position before it quantises them, so it has to
rotate by exactly the angles that the model uses. They are taken from the loaded model and nothing
is inferred from config names: the rotary module of a layer is the one held by the nearest module
around the layer's Attention. The frequencies of a module of vLLM come from its own
``_compute_inv_freq`` and are checked against its ``cos_sin_cache``, those of a module of
transformers (models that vLLM runs through its Transformers backend) are its ``inv_freq`` and are
checked against the cosines and sines that it answers.

Whether a layer applies its module, to which channels and to which pairs of them is then seen in
keys that the model makes of the same tokens at several positions (probe.py). What was found either
gives those keys, or the model is refused.

(vLLM's ``_ROPE_DICT`` was not used: it holds every rotary module of the process, also those of
other engines and of a vision tower.)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from kakeya_vllm import probe
from kakeya_vllm.support import UnsupportedFeature, layer_index

# How far keys may be from what they are turned to: in parts of a pair of channels, and of the root
# mean square of a head's channels. bfloat16 takes 1 part in 100; another layout, another channel or
# the wrong direction is off by a whole pair.
PAIR_WITHIN = 2.0**-4
HEAD_WITHIN = 2.0**-5
# Rotary modules of transformers that turn position p by p * inv_freq whatever the sequence length.
FIXED_TYPES = ("default", "linear", "llama3", "yarn")


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

    def gives(self, keys: torch.Tensor, positions: list[int]) -> bool:
        """Whether ``keys`` [samples, positions, heads, head_dim], of the same tokens at each of the
        positions, are what this embedding makes of those at position 0, the first."""
        if self.rotary_dim > keys.shape[-1]:
            return False
        head = keys[:, :1].square().mean(-1, keepdim=True).sqrt()
        turned, rest = keys.split([self.rotary_dim, keys.shape[-1] - self.rotary_dim], -1)
        pairs = (
            turned.unflatten(-1, (-1, 2))
            if self.interleaved
            else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
        )
        spots = torch.view_as_complex(pairs.contiguous())
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float64)
        angles = torch.tensor(positions, dtype=torch.float64)[:, None, None] * inv_freq
        expected = spots[:, :1] * torch.polar(torch.ones_like(angles), angles)
        # Angles are products in float32.
        within = (PAIR_WITHIN + angles * 2.0**-22) * expected.abs() + HEAD_WITHIN * head
        near = bool(((spots - expected).abs() <= within).all())
        return near and _unchanged(rest, head)


def find(model: torch.nn.Module, layer_names: list[str], vllm_config: Any) -> Rope | None:
    """The one rotary embedding of the named attention layers of a loaded model; None if they apply
    none. Runs the model once on a few tokens: see probe.py, also for ranks that work together.

    Raises UnsupportedFeature if layers differ, if the kind is not one with fixed angles, or if keys
    are turned in another way.
    """
    text_config = vllm_config.model_config.hf_text_config
    return of_keys(model, layer_names, text_config, probe.keys(model, layer_names, vllm_config))


def of_keys(
    model: torch.nn.Module, layer_names: list[str], text_config: Any, keys: probe.Keys
) -> Rope | None:
    """The same, from the keys that the layers were given."""
    modules = dict(model.named_modules())
    # A layer's name is mostly its place in the model, and not always (Falcon-H1).
    places = {getattr(module, "layer_name", None): path for path, module in modules.items()}
    # Learned positions leave no other trace.
    expected = _declares_rope(text_config) or any(_is_rotary(m) for m in modules.values())
    ropes: dict[str, Rope | None] = {}
    extracted: dict[tuple[int, str], list[Rope]] = {}
    for name in layer_names:
        seen = _checked(keys.layers[name], name)
        if _unchanged(seen):
            ropes[name] = None
            continue
        module = _nearest_rotary(modules, places.get(name, name))
        if module is None:
            if expected or _same_lengths(seen):
                raise UnsupportedFeature(
                    ["a model whose rotary embedding is not beside its attention layers"]
                )
            ropes[name] = None
            continue
        kind = _layer_type(module, text_config, name)
        key = (id(module), kind)
        if key not in extracted:
            extracted[key] = _layouts(module, kind, text_config)
        matching = [rope for rope in extracted[key] if rope.gives(seen, keys.positions)]
        if not matching:
            raise UnsupportedFeature(
                [
                    f"rotary embedding {type(module).__name__}: keys are not turned by its angles "
                    f"alone ({name})"
                ]
            )
        ropes[name] = matching[0]
    distinct = set(ropes.values())
    without = [name for name, rope in ropes.items() if rope is None]
    if without and len(distinct) > 1:
        raise UnsupportedFeature([f"models that rotate only some layers ({without[0]} does not)"])
    if len(distinct) > 1:
        raise UnsupportedFeature(["several different rotary embeddings on compressed layers"])
    return distinct.pop()


def _layouts(module: Any, layer_type: str, text_config: Any) -> list[Rope]:
    """What a module may stand for: one of vLLM says which channels are pairs, while with one of
    transformers the code around it decides."""
    if not _is_of_transformers(module):
        return [extract(module)]
    halves = extract_of_transformers(module, layer_type, text_config)
    return [halves, dataclasses.replace(halves, interleaved=True)]


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
    elif kind == "Phi3LongRoPEScaledRotaryEmbedding":
        return _of_longrope(module)
    else:
        reason = {
            "DynamicNTKScalingRotaryEmbedding": "its angles depend on the sequence length",
            "DynamicNTKAlphaRotaryEmbedding": "its angles depend on the sequence length",
            "MRotaryEmbedding": "M-RoPE has several positions a token",
        }.get(kind, "only embeddings with fixed angles are known")
        raise UnsupportedFeature([f"rotary embedding {kind} ({reason})"])
    rope = Rope(
        rotary_dim=int(module.rotary_dim),
        interleaved=not module.is_neox_style,
        inv_freq=tuple(inv_freq.double().flatten().tolist()),
        mscale=mscale,
    )
    cache = module.cos_sin_cache
    positions = _sampled(cache.shape[0])
    _verify(rope, positions, cache[positions.to(cache.device)], kind)
    return rope


def _of_longrope(module: Any) -> Rope:
    """Of the two sets of angles that vLLM's module has for short and long contexts the one that
    this engine's ``max_model_len`` chose: it uses that for sequences of all lengths."""
    kind = type(module).__name__
    if module.short_mscale != module.long_mscale:
        # An artefact's means of keys would be those of the other scale.
        raise UnsupportedFeature(
            [f"rotary embedding {kind} (its keys have another scale in short contexts)"]
        )
    long, short_rows = module.use_long_rope, module.original_max_position_embeddings
    inv_freq = module._compute_inv_freq(module.long_factor if long else module.short_factor)
    rope = Rope(
        rotary_dim=int(module.rotary_dim),
        interleaved=False,  # the module refuses anything else
        inv_freq=tuple(inv_freq.double().flatten().tolist()),
        mscale=float(module.long_mscale),
    )
    # One table, that for short contexts first.
    table = module.long_short_cos_sin_cache
    table = table[short_rows:] if long else table[:short_rows]
    positions = _sampled(table.shape[0])
    _verify(rope, positions, table[positions.to(table.device)], kind)
    return rope


def extract_of_transformers(module: Any, layer_type: str, text_config: Any) -> Rope:
    """Angles of one rotary module of transformers, for layers of a type if it tells these apart
    (else ""), verified against the cosines and sines that it answers. Channels are taken to be
    pairs by halves; the module does not say."""
    name = type(module).__name__
    kind = module.rope_type[layer_type] if layer_type else module.rope_type
    if kind not in FIXED_TYPES:
        reason = {
            "dynamic": "its angles depend on the sequence length",
            "longrope": "longrope switches angles by sequence length",
        }.get(kind, "only embeddings with fixed angles are known")
        raise UnsupportedFeature([f"rotary embedding {name} of type {kind} ({reason})"])
    prefix = f"{layer_type}_" if layer_type else ""
    inv_freq = getattr(module, f"{prefix}inv_freq")
    rope = Rope(
        rotary_dim=2 * inv_freq.numel(),
        interleaved=False,
        inv_freq=tuple(inv_freq.double().flatten().tolist()),
        mscale=float(getattr(module, f"{prefix}attention_scaling")),
    )
    positions = _sampled(int(getattr(text_config, "max_position_embeddings", 0) or 4096))
    places = positions.to(inv_freq.device)[None]
    like = torch.zeros(1, dtype=torch.float32, device=inv_freq.device)
    answer = module(like, places, layer_type) if layer_type else module(like, places)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise UnsupportedFeature([f"rotary embedding {name}, which answers no cosines and sines"])
    # Once for each channel: by halves, or by neighbours.
    cos, sin = (part[0].float() for part in answer)
    half = cos.shape[-1] // 2
    channels = slice(half) if torch.equal(cos[:, :half], cos[:, half:]) else slice(None, None, 2)
    _verify(rope, positions, torch.cat((cos[:, channels], sin[:, channels]), -1), name)
    return rope


def _sampled(count: int) -> torch.Tensor:
    """Some of ``count`` positions."""
    steps = {0, 1, 2, 3, 17, 127, 128, 1000, count // 3, count // 2, count - 1}
    return torch.tensor(sorted(p for p in steps if p < count))


def _verify(rope: Rope, positions: torch.Tensor, table: torch.Tensor, kind: str) -> None:
    """Compare angles with rows [positions, rotary_dim] = [cos | sin] of the model's own."""
    if len(rope.inv_freq) * 2 != rope.rotary_dim or table.shape[-1] != rope.rotary_dim:
        raise UnsupportedFeature([f"rotary embedding {kind} of {table.shape[-1]} channels"])
    rounding = torch.finfo(table.dtype).eps
    table = table.double().cpu()
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64)
    angles = positions[:, None].double() * inv_freq
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.mscale
    # The table was computed from float32 angles (an error of p * inv_freq * 2^-23, twice for the
    # product) and rounded to its own dtype.
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


def _checked(keys: torch.Tensor, name: str) -> torch.Tensor:
    """Keys that can show something: some, finite, and not all zero."""
    wrong = ""
    if not keys.numel():
        wrong = "was given none"
    elif not bool(keys.isfinite().all()):
        wrong = "they are not finite"
    elif not bool(keys[:, 0].any()):
        wrong = "they are zero"
    if wrong:
        raise UnsupportedFeature([f"a model whose keys cannot be looked at ({name}: {wrong})"])
    return keys


def _unchanged(keys: torch.Tensor, head: torch.Tensor | None = None) -> bool:
    """Whether keys [samples, positions, heads, channels] are the same at all positions. ``head``:
    root mean squares at the first, if of more channels than these."""
    first = keys[:, :1]
    if head is None:
        head = first.square().mean(-1, keepdim=True).sqrt()
    return bool(((keys - first).abs() <= PAIR_WITHIN * first.abs() + HEAD_WITHIN * head).all())


def _same_lengths(keys: torch.Tensor) -> bool:
    """Whether every head's key is as long at all positions, as rotations leave it."""
    lengths = keys.norm(dim=-1)
    return bool(((lengths - lengths[:, :1]).abs() <= PAIR_WITHIN * lengths[:, :1]).all())


def _layer_type(module: Any, text_config: Any, name: str) -> str:
    """The type of a layer for a module that tells these apart, otherwise empty."""
    if not isinstance(getattr(module, "rope_type", None), dict):
        return ""
    kinds = getattr(text_config, "layer_types", None) or ()
    index = layer_index(name)
    kind = kinds[index] if index is not None and index < len(kinds) else None
    if kind not in module.rope_type:
        raise UnsupportedFeature(
            [f"rotary embedding {type(module).__name__}, which has no angles for {name}"]
        )
    return kind


def _is_rotary(module: Any) -> bool:
    of_vllm = hasattr(module, "rotary_dim") and (
        hasattr(module, "cos_sin_cache") or hasattr(module, "long_short_cos_sin_cache")
    )
    return of_vllm or _is_of_transformers(module)


def _is_of_transformers(module: Any) -> bool:
    """A rotary module as transformers has them since 5: one for all layers, with ``rope_type`` and
    ``inv_freq``, or with several of both, one for each type of layer."""
    if not hasattr(module, "rope_type"):
        return False
    return any(name == "inv_freq" or name.endswith("_inv_freq") for name in module._buffers)


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
