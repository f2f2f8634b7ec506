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

Cost: two forward passes over the text; memory of one passage of one layer.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from kakeya_vllm import __version__, engine
from kakeya_vllm.config import default_calibration_path, model_fingerprint
from kakeya_vllm.rope import Rope, find
from kakeya_vllm.text import (
    SPLITS,
    WIKITEXT2_TEST_SHA256,
    detokenise,
    read_text,
    sha256_of,
    spread_passages,
    tokenise,
)

FORMAT = "kakeya-calibration-1"
BLOCK = 128
# The first tokens of a sequence are sinks in most models and never typical: they take no part in
# any statistic.
SKIPPED_POSITIONS = 8
# A channel counts for the sink score if it turns by less than this many radians over SINK_REACH
# positions.
SINK_REACH, SINK_TURN = 2048, 2.0
SINK_RANKS = 8
# Queries that `sink_mass` is averaged over: far from the keys of the first half, and few.
SINK_QUERY_STRIDE = 64


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
    """Takes RoPE off rows [n, heads, D] at positions 0..n-1. `rope`: kakeya_vllm.rope.Rope, None
    for a model without."""

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

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Float64 [n, heads, D]: what was rotated, before."""
        rows = rows.double()
        angle = torch.arange(rows.shape[0], device=rows.device)[:, None, None] * self.frequency
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

    def __init__(self, model, hf_config):
        self.layers = engine.attention_layers(model)
        if not self.layers:
            raise SystemExit("kakeya: the model has no attention layers that KAKEYA could serve")
        shapes = {(m.num_kv_heads, m.num_heads, m.head_size) for _, m in self.layers}
        if len(shapes) > 1:
            raise SystemExit(
                "kakeya: attention layers of different shapes in one model are not supported"
            )
        (self.shape,) = shapes
        device = next(model.parameters()).device
        unrotate = Unrotation(
            find(model, [name for name, _ in self.layers], hf_config), self.shape[2], device
        )
        self.statistics = [
            LayerStatistics(*self.shape, unrotate, module.impl.scale, device)
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


def collect(llm, passages: list[list[int]]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Statistics of `passages` (each a whole number of blocks, at most a chunk) and their shape.

    `llm` is an engine of `engine.in_process_engine`. Returns float32 tensors on the CPU and the
    shape entries of the artefact's metadata.
    """
    from tqdm import tqdm

    hf_config = llm.llm_engine.vllm_config.model_config.hf_text_config
    capture = engine.on_model(llm, lambda model: Capture(model, hf_config))
    total = 2 * sum(map(len, passages))
    with capture.hooks(), tqdm(total=total, unit="tok", unit_scale=True, desc="calibrating") as bar:
        for second in (False, True):
            if second:
                capture.start_second_pass()
            for passage in passages:
                capture.run(llm, passage)
                bar.update(len(passage))
    results = [statistics.result() for statistics in capture.statistics]
    tensors = {
        name: torch.stack([r[name] for r in results]).float().cpu().contiguous()
        for name in results[0]
    }
    check(tensors)
    heads, query_heads, dim = capture.shape
    return tensors, {
        "tokens": str(total // 2),
        "num_layers": str(len(results)),
        "num_kv_heads": str(heads),
        "num_q_heads": str(query_heads),
        "head_dim": str(dim),
    }


def calibrate(model: str, text_path: str, tokens: int, out: str | None = None) -> Path:
    """Write the calibration artefact of `model` and return its path.

    `tokens` is rounded down to whole passages of 2,048. `out` defaults to the place where the
    plugin looks. The WikiText-2 test split is refused.
    """
    refuse_test_split(text_path)
    ids = tokenise(model, detokenise(read_text(text_path)))
    passages = spread_passages(ids, engine.CHUNK, tokens // engine.CHUNK)
    print(f"kakeya: loading {model}", flush=True)
    llm = engine.in_process_engine(model)
    fingerprint = model_fingerprint(llm.llm_engine.vllm_config.model_config.hf_text_config)
    tensors, shape = collect(llm, passages)
    target = Path(out) if out else default_calibration_path(fingerprint)
    return write_artefact(target, FORMAT, tensors, fingerprint, model, text_path, shape)


def refuse_test_split(text_path: str) -> None:
    """SystemExit if the text is the one that figures are measured on."""
    if sha256_of(text_path) == WIKITEXT2_TEST_SHA256:
        raise SystemExit(
            f"kakeya: {text_path} is the WikiText-2 test split, which is for evaluation only"
        )


def write_artefact(
    target: Path,
    file_format: str,
    tensors: dict[str, torch.Tensor],
    fingerprint: str,
    model: str,
    text_path: str,
    about: dict[str, str],
) -> Path:
    """Write tensors with where they come from as metadata; returns ``target``."""
    from safetensors.torch import save_file

    digest = sha256_of(text_path)
    metadata = {
        "format": file_format,
        "model_fingerprint": fingerprint,
        "model": Path(model).name,
        "text_sha256": digest,
        "split": SPLITS.get(digest, "unknown"),
        "kakeya_version": __version__,
        **about,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a reader never sees half a file.
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    save_file(tensors, str(partial), metadata=metadata)
    # safetensors makes its files private to the user; an artefact is shared like any other file.
    partial.chmod(0o644)
    os.replace(partial, target)
    return target


def check(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse to write statistics that the codec could not use."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SystemExit(f"kakeya: {name} of this model is not finite; nothing was written")
