"""Calibration: forward-only statistics of a model's keys, values and queries.

The codec divides its bits among channels by how much each channel varies (K, V) and how strongly
queries look at it; these are means over ordinary text, so a forward pass is all it takes: no
gradients, no labels. The model runs in vLLM with its stock attention; pre-forward hooks on the
attention layers see q, k and v exactly as a cache would.

Per layer and KV head (D channels; a group is the query heads that share a KV head), over tokens
at position >= 8:

    k_mean, k_var    [L, H, D]  key before RoPE
    q_mean, q_sq     [L, H, D]  query before RoPE, over tokens and heads of the group:
                                mean, and mean of squares
    v_mean, v_var    [L, H, D]  V' = V @ Hadamard (orthonormal; block-diagonal where D
                                is no power of two)
    sink_mass        [L, H, 8]  attention probability on the token of rank 1..8 of every block,
                                summed over the blocks of a sequence

A few tokens of a text (attention sinks) have keys far from all others. The codec stores them
exactly, so they must not stretch the statistics of the rest. Pass 1 finds the mean query; pass 2
leaves out, in each block of 128 tokens, the token that the mean query looks at most, counting
only channels slow enough to keep their phase over 2,048 positions. The same score ranks the
tokens of a block for `sink_mass`, which tells the codec how many of them deserve to be exact; it is
a mean over the query heads of the group and over every 64th query of a passage's second half.

Cost: two forward passes over the text; memory of one passage of one layer. The sums are written
beside the output after every passage, so an interrupted calibration goes on where it was
(progress.py). Passages that took no part then show what was gained (heldout.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kakeya_vllm import __version__, engine, heldout, lib
from kakeya_vllm.config import ARTEFACT_FORMAT, default_calibration_path, model_fingerprint
from kakeya_vllm.progress import Progress, key_of, weights_digest, write_atomically
from kakeya_vllm.rope import Rope, find
from kakeya_vllm.text import (
    BUNDLED_TEXT,
    SPLITS,
    detokenise,
    held_out_passages,
    read_text,
    refuse_test_text,
    sha256_of,
    spread_passages,
    tokenise,
)

BLOCK = lib.BLOCK_TOKENS
# The first tokens of a sequence are sinks in most models and never typical: they take no part in
# any statistic.
SKIPPED_POSITIONS = 8
# A channel counts for the sink score if it turns by less than this many radians over SINK_REACH
# positions.
SINK_REACH, SINK_TURN = 2048, 2.0
SINK_RANKS = 8
# Queries that `sink_mass` is averaged over: far from the keys of the first half, and few.
SINK_QUERY_STRIDE = 64
# Least variance, and mean square of queries, of a channel, as a share of its head's median. The
# codec's scales follow a block from a quarter to 32 times the calibrated deviation: a channel that
# stood still on the calibration text may then still move as far as the others do.
LEAST_SHARE = 1e-3


def hadamard(size: int) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard matrix in natural (Sylvester) order, float64.

    Where `size` is no power of two: block-diagonal, of the largest power of two that divides it.
    """
    block = size & -size
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return torch.block_diag(*[h / block**0.5] * (size // block))


class Unrotation:
    """Takes RoPE off rows [n, heads, D] at consecutive positions. `rope`: kakeya_vllm.rope.Rope,
    None for a model without."""

    def __init__(self, rope: Rope | None, dim: int, device):
        half = (rope.rotary_dim if rope else 0) // 2
        # Channels of each pair: neighbours, or the two halves of the rotated part.
        index = torch.arange(2 * half, device=device)
        self.first, self.second = (
            (index[0::2], index[1::2])
            if rope and rope.interleaved
            else (index[:half], index[half:])
        )
        self.frequency = torch.tensor(
            rope.inv_freq if rope else (), dtype=torch.float64, device=device
        )
        # Radians a position of every channel; 0 where nothing turns.
        self.channel_frequency = torch.zeros(dim, dtype=torch.float64, device=device)
        self.channel_frequency[self.first] = self.frequency
        self.channel_frequency[self.second] = self.frequency

    def __call__(self, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Float64 [n, heads, D]: what was rotated, before; the first row stands at `start`."""
        rows = rows.double()
        positions = torch.arange(start, start + rows.shape[0], device=rows.device)
        angle = positions[:, None, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        x, y = rows[..., self.first], rows[..., self.second]
        rows[..., self.first] = x * cos + y * sin
        rows[..., self.second] = y * cos - x * sin
        return rows


@dataclass
class Moments:
    """Running sums of rows [n, H, D] in float64."""

    count: float
    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zeros(cls, heads: int, dim: int, device) -> Moments:
        z = torch.zeros(heads, dim, dtype=torch.float64, device=device)
        return cls(0.0, z, z.clone())

    def add(self, rows: torch.Tensor) -> None:
        self.count += rows.shape[0]
        self.total += rows.sum(0)
        self.squares += rows.square().sum(0)

    def mean(self) -> torch.Tensor:
        return self.total / self.count

    def mean_square(self) -> torch.Tensor:
        return self.squares / self.count

    def var(self) -> torch.Tensor:
        return (self.mean_square() - self.mean().square()).clamp_min(0.0)


@dataclass
class MaskedMoments(Moments):
    """The same where every head leaves out its own rows: `count` is one number a head, `keep` is
    [n, H]."""

    @classmethod
    def zeros(cls, heads: int, dim: int, device) -> MaskedMoments:
        z = torch.zeros(heads, dim, dtype=torch.float64, device=device)
        return cls(torch.zeros(heads, 1, dtype=torch.float64, device=device), z, z.clone())

    def add(self, rows: torch.Tensor, keep: torch.Tensor) -> None:
        w = keep[:, :, None].to(rows.dtype)
        self.count += w.sum(0)
        self.total += (rows * w).sum(0)
        self.squares += (rows.square() * w).sum(0)


class LayerStatistics:
    """Both passes of one attention layer. Rows come as the layer gets them: after RoPE, [tokens,
    heads * D] or [.., D]."""

    def __init__(
        self, heads: int, query_heads: int, dim: int, unrotate: Unrotation, scale: float, device
    ):
        self.heads, self.group, self.dim = heads, query_heads // heads, dim
        self.unrotate, self.scale = unrotate, scale
        self.hadamard = hadamard(dim).to(device)
        self.query = Moments.zeros(heads, dim, device)
        self.key = MaskedMoments.zeros(heads, dim, device)
        self.value = MaskedMoments.zeros(heads, dim, device)
        self.mass = torch.zeros(heads, SINK_RANKS, dtype=torch.float64, device=device)
        self.passages = 0
        self.score_vector: torch.Tensor | None = None

    def first_pass(self, q: torch.Tensor) -> None:
        rows = self.unrotate(q.reshape(-1, self.heads * self.group, self.dim))[SKIPPED_POSITIONS:]
        # Query head h belongs to KV head h // group.
        rows = (
            rows.reshape(-1, self.heads, self.group, self.dim)
            .transpose(1, 2)
            .reshape(-1, self.heads, self.dim)
        )
        self.query.add(rows)

    def sums(self) -> dict[str, torch.Tensor]:
        """Everything that passages add to, by name; float64. The tensors themselves, not copies."""
        found = {"mass": self.mass, "passages": torch.tensor(float(self.passages)).double()}
        for name in ("query", "key", "value"):
            moments = getattr(self, name)
            count = torch.as_tensor(moments.count, dtype=torch.float64)
            found |= {f"{name}.count": count}
            found |= {f"{name}.total": moments.total, f"{name}.squares": moments.squares}
        return found

    def restore(self, sums: dict[str, torch.Tensor]) -> None:
        """Take over the sums of another; the second pass has to be started by hand."""
        device = self.mass.device
        self.mass = sums["mass"].to(device)
        self.passages = int(sums["passages"])
        for name in ("query", "key", "value"):
            moments = getattr(self, name)
            count = sums[f"{name}.count"]
            moments.count = count.to(device) if count.ndim else float(count)
            moments.total = sums[f"{name}.total"].to(device)
            moments.squares = sums[f"{name}.squares"].to(device)

    def start_second_pass(self) -> None:
        self.score_vector = self.query.mean() * (
            self.unrotate.channel_frequency * SINK_REACH < SINK_TURN
        )

    def second_pass(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        key = self.unrotate(k.reshape(-1, self.heads, self.dim))
        score = torch.einsum("thd,hd->ht", key, self.score_vector)
        self._add_sink_mass(q, k, score)
        score[:, :SKIPPED_POSITIONS] = -torch.inf
        keep = torch.ones_like(score, dtype=torch.bool)
        keep[:, :SKIPPED_POSITIONS] = False
        keep.scatter_(1, self._best(score, 1), False)
        self.key.add(key, keep.T)
        self.value.add(v.reshape(-1, self.heads, self.dim).double() @ self.hadamard, keep.T)

    def _best(self, score: torch.Tensor, ranks: int) -> torch.Tensor:
        """Tokens [H, blocks * ranks] of the highest scores of each block; score is [H, tokens]."""
        top = score.reshape(self.heads, -1, BLOCK).topk(ranks, dim=2).indices
        starts = torch.arange(top.shape[1], device=top.device) * BLOCK
        return (top + starts[:, None]).reshape(self.heads, -1)

    def _add_sink_mass(self, q: torch.Tensor, k: torch.Tensor, score: torch.Tensor) -> None:
        tokens = score.shape[1]
        at = torch.arange(
            tokens // 2 + SINK_QUERY_STRIDE, tokens, SINK_QUERY_STRIDE, device=q.device
        )
        queries = q.reshape(tokens, self.heads, self.group, self.dim)[at].double()
        keys = k.reshape(tokens, self.heads, self.dim).double()
        logits = torch.einsum("nhgd,thd->hgnt", queries, keys) * self.scale
        future = torch.arange(tokens, device=q.device) > at[:, None]
        attention = logits.masked_fill(future, -torch.inf).softmax(-1).mean((1, 2))
        best = attention.gather(1, self._best(score, SINK_RANKS))
        self.mass += best.reshape(self.heads, -1, SINK_RANKS).sum(1)
        self.passages += 1

    def result(self) -> dict[str, torch.Tensor]:
        return {
            "k_mean": self.key.mean(),
            "k_var": self.key.var(),
            "q_mean": self.query.mean(),
            "q_sq": self.query.mean_square(),
            "v_mean": self.value.mean(),
            "v_var": self.value.var(),
            "sink_mass": self.mass / self.passages,
        }


class Capture:
    """Hooks on the attention layers of a model; hands q, k, v of every prompt to one pass of the
    statistics."""

    def __init__(self, model, vllm_config):
        found = engine.compressed_layers(model)
        self.numbers = [number for number, _, _ in found]  # of the layers, in the model
        self.layers = [(name, module) for _, name, module in found]
        if not self.layers:
            raise SystemExit("kakeya: the model has no attention layers that KAKEYA could serve")
        shapes = {(m.num_kv_heads, m.num_heads, m.head_size) for _, m in self.layers}
        if len(shapes) > 1:
            raise SystemExit(
                "kakeya: attention layers of different shapes in one model are not supported"
            )
        (self.shape,) = shapes
        device = next(model.parameters()).device
        self.unrotate = Unrotation(
            find(model, [name for name, _ in self.layers], vllm_config), self.shape[2], device
        )
        self.statistics = [
            LayerStatistics(*self.shape, self.unrotate, module.impl.scale, device)
            for _, module in self.layers
        ]
        self.expected_tokens = 0
        self.seen = 0
        self.second = False

    @contextlib.contextmanager
    def hooks(self):
        """The hooks are on the model for the length of a with block."""
        handles = [
            module.register_forward_pre_hook(self._hook(statistics), with_kwargs=True)
            for (_, module), statistics in zip(self.layers, self.statistics, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def state(self) -> dict[str, torch.Tensor]:
        """The sums of all layers, [layers, ...] on the CPU."""
        layers = [statistics.sums() for statistics in self.statistics]
        return {name: torch.stack([sums[name] for sums in layers]).cpu() for name in layers[0]}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for i, statistics in enumerate(self.statistics):
            statistics.restore({name: stacked[i].clone() for name, stacked in state.items()})

    def start_second_pass(self) -> None:
        self.second = True
        for statistics in self.statistics:
            statistics.start_second_pass()

    def _hook(self, statistics: LayerStatistics):
        def hook(_module, args, kwargs):
            values = list(args) + [kwargs[n] for n in ("query", "key", "value")[len(args) :]]
            q, k, v = values[:3]
            if q.shape[0] != self.expected_tokens:
                raise RuntimeError(
                    f"a step of {q.shape[0]} tokens instead of a whole passage of "
                    f"{self.expected_tokens}"
                )
            if self.second:
                statistics.second_pass(q, k, v)
            else:
                statistics.first_pass(q)
            self.seen += 1

        return hook

    def run(self, llm, passage: list[int]) -> None:
        self.expected_tokens, before = len(passage), self.seen
        engine.run_prompt(llm, passage)
        if self.seen - before != len(self.layers):
            raise RuntimeError(
                f"{self.seen - before} layers ran for a passage, expected {len(self.layers)}"
            )


def capture_of(llm) -> Capture:
    """Ready to collect on ``llm``, an engine of `engine.in_process_engine`."""
    vllm_config = llm.llm_engine.vllm_config
    return engine.on_model(llm, lambda model: Capture(model, vllm_config))


def collect(
    llm, capture: Capture, passages: list[list[int]], progress: Progress | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Statistics of `passages` (each a whole number of blocks, at most a chunk) and their shape.

    Returns float32 tensors on the CPU and the shape entries of the artefact's metadata.
    `progress`: where sums are kept, and what they go on from.
    """
    from tqdm import tqdm

    found = progress.load(capture.state()) if progress else None
    if found is not None:
        capture.restore(found[2])
    resumed = found[:2] if found else (False, 0)
    tokens = sum(map(len, passages))
    with (
        capture.hooks(),
        tqdm(total=2 * tokens, unit="tok", unit_scale=True, desc="calibrating") as bar,
    ):
        for second in (False, True):
            if second:
                capture.start_second_pass()
            for i, passage in enumerate(passages):
                if (second, i) >= resumed:
                    capture.run(llm, passage)
                    if progress:
                        progress.save(second, i + 1, capture.state())
                bar.update(len(passage))
    results = [statistics.result() for statistics in capture.statistics]
    layers = llm.llm_engine.vllm_config.model_config.get_total_num_hidden_layers()
    tensors = {}
    for name, first in results[0].items():
        # Layers that are not compressed stay zero: the codec is never asked for them.
        tensors[name] = torch.zeros(layers, *first.shape)
        for number, result in zip(capture.numbers, results, strict=True):
            tensors[name][number] = result[name].float().cpu()
    try:
        check(tensors)
    except SystemExit:
        # The sums themselves are spoilt: going on from them would end here again.
        if progress:
            progress.remove()
        raise
    heads, query_heads, dim = capture.shape
    return tensors, {
        "tokens": str(tokens),
        "num_layers": str(layers),
        "num_kv_heads": str(heads),
        "num_q_heads": str(query_heads),
        "head_dim": str(dim),
    }


@dataclass(frozen=True)
class Sample:
    """What a calibration runs on: passages of 2,048 tokens, those that take no part and show its
    error, and what the artefact says of their origin."""

    passages: list[list[int]]
    held_out: list[list[int]]
    about: dict[str, str]


def sample_of_text(ids: list[int], tokens: int, path: str | Path) -> Sample:
    """Passages spread over the token ids of a text. Of the bundled text as many as it has, of
    another text as many as were asked for (SystemExit where it is too short)."""
    count = tokens // engine.CHUNK
    if Path(path) == BUNDLED_TEXT:
        # One in five is left for the error.
        count = min(count, max(1, len(ids) // engine.CHUNK * 4 // 5))
    digest = sha256_of(path)
    return Sample(
        spread_passages(ids, engine.CHUNK, count),
        held_out_passages(ids, engine.CHUNK, count),
        {"text_sha256": digest, "split": SPLITS.get(digest, "unknown")},
    )


def sample_of_weights(vocabulary: int, tokens: int, text: Sample) -> Sample:
    """Random token ids: whatever the model makes of them comes from its weights alone. The error is
    shown on ``text``, none of which takes part."""
    draw = random.Random(0)
    passages = [
        [draw.randrange(vocabulary) for _ in range(engine.CHUNK)]
        for _ in range(tokens // engine.CHUNK)
    ]
    return Sample(passages, text.held_out, {"text_sha256": "none", "split": "random tokens"})


def calibrate(
    model: str,
    text_path: str | Path | None = None,
    tokens: int = 8 * engine.CHUNK,
    out: str | Path | None = None,
    *,
    weights_only: bool = False,
    recipe: str | None = None,
    expected_fingerprint: str | None = None,
    tokenizer: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write the calibration artefact of `model` and return its path.

    `text_path` None: the bundled text. `weights_only`: on random tokens, and the text shows the
    error only. `tokens` is rounded down to whole passages of 2,048. `out` defaults to the place
    where the plugin looks. `recipe`: at which the error on held-out passages is reported; the
    artefact serves every one. `expected_fingerprint`: another model is refused. `settings`: more
    of vllm.LLM's.

    Raises SystemExit with the reason: test text, a text too short, a model or a recipe that the
    codec does not serve, statistics that are not finite.
    """
    path = BUNDLED_TEXT if text_path is None else text_path
    text = read_text(path)
    refuse_test_text(text, path)
    recipe = recipe or heldout.recipe_of_ratio(4.6)
    settings = settings or {}
    ids = tokenise(tokenizer or model, detokenise(text), **_tokenizer_settings(settings))
    sample = sample_of_text(ids, tokens, path)
    print(f"kakeya: loading {model}", flush=True)
    llm = engine.in_process_engine(model, tokenizer=tokenizer, **settings)
    model_config = llm.llm_engine.vllm_config.model_config
    if weights_only:
        sample = sample_of_weights(model_config.get_vocab_size(), tokens, sample)
    fingerprint = model_fingerprint(model_config.hf_text_config)
    if expected_fingerprint not in (None, fingerprint):
        raise SystemExit(
            f"kakeya: the model fingerprint is {fingerprint}, not {expected_fingerprint}: "
            f"{model} was loaded with another configuration than it is to be calibrated for"
        )
    target = Path(out) if out else default_calibration_path(fingerprint)
    progress = Progress(
        target,
        key_of(
            format=ARTEFACT_FORMAT,
            version=__version__,
            model=fingerprint,
            weights=engine.on_model(llm, weights_digest),
            dtype=str(model_config.dtype),
            passages=hashlib.sha256(json.dumps(sample.passages).encode()).hexdigest(),
        ),
    )
    # The codec judges model and recipe before minutes are spent on them.
    pages = heldout.HeldOut(llm, recipe)
    capture = capture_of(llm)
    tensors, shape = collect(llm, capture, sample.passages, progress)
    raised = regularise(tensors)
    metadata = {
        "format": ARTEFACT_FORMAT,
        "model_fingerprint": fingerprint,
        "model": Path(model).name,
        "kakeya_version": __version__,
        "raised_channels": str(raised),
        **sample.about,
        **shape,
    }
    codec = pages.codec(artefact_bytes(tensors, metadata))
    if raised:
        print(f"kakeya: {raised} channels that hardly move were given a least variance")
    if sample.held_out:
        found = pages.measure(capture, tensors["q_sq"], codec, sample.held_out)
        metadata["held_out"] = json.dumps(found)
        _print(heldout.error_lines(found))
    else:
        _print(["no error on held-out text: the text has no passage that took no part"])
    _print(heldout.allocation_lines(codec.describe()))
    print("the artefact serves every recipe and ratio: bits are allocated when it is loaded")
    write_artefact(target, artefact_bytes(tensors, metadata))
    progress.remove()
    return target


def write_artefact(target: Path, data: bytes) -> None:
    """The bytes of an artefact as ``target``, whole or not at all; SystemExit with the reason."""
    try:
        write_atomically(target, data)
    except OSError as error:
        raise SystemExit(
            f"kakeya: the artefact ({len(data)} bytes) cannot be written to {target}: {error}; "
            "nothing was written. Make room, or name another place (--out, KAKEYA_CACHE)"
        ) from error


def _print(lines: list[str]) -> None:
    print("\n".join(["", *lines]), flush=True)


def artefact_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of an artefact: tensors, and where they come from."""
    from safetensors.torch import save

    return save(tensors, metadata=metadata)


def _tokenizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Of an engine's settings, those that choose its tokenizer."""
    names = {"tokenizer_revision": "revision", "trust_remote_code": "trust_remote_code"}
    return {names[n]: v for n, v in settings.items() if n in names and v}


def regularise(tensors: dict[str, torch.Tensor]) -> int:
    """Raise variances and mean squares that are next to nothing, in place; how many were.

    No channel of a head gets less than LEAST_SHARE of the head's median (of its mean, where more
    than half of the channels are dead; a head that is all zero stays so, and the codec has a floor
    of its own for it).
    """
    raised = 0
    for name in ("k_var", "v_var", "q_sq"):
        values = tensors[name]
        # The upper one of two: with half of the channels dead it is still that of a living one.
        median = values.sort(-1).values[..., values.shape[-1] // 2, None]
        typical = torch.where(median > 0, median, values.mean(-1, keepdim=True))
        least = LEAST_SHARE * typical
        raised += int((values < least).sum())
        tensors[name] = torch.maximum(values, least)
    return raised


def check(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse to write statistics that the codec could not use."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SystemExit(f"kakeya: {name} of this model is not finite; nothing was written")
