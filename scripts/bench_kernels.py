"""Kernel benchmark on a GPU: attention over pages and sealing, beside FlashAttention and a copy.

    python scripts/bench_kernels.py                       # the tables of docs/benchmarks.md
    python scripts/bench_kernels.py --recipes kakeya-4.6x --head-dims 128 --cells 64x8192 --no-seal

Attention of one layer, one query token a sequence: batch x context sealed tokens, an open block of
one token a sequence, shuffled blocks. Pages are sealed by the library from random rows with the
statistics of a synthetic artefact. A CUDA graph holds launches over several layers with data of
their own, four times what L2 holds; printed is the median over replays, of one launch. In the same
process: a copy on the device (bytes read and written), and vLLM's FlashAttention over a bf16 cache
of the same shape, called as vLLM calls it in a full graph, with blocks of 16 and of 128 tokens; the
faster one counts. Before a time is printed the outputs are held against float32 attention over
what the library opens from the same pages. Cells in bold are those that KAKEYA loses.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_common as common
import torch
from kakeya_vllm import cuda, lib

CELLS = "64x8192,32x32768,1x131072,1x8192,1x4096,1x1024"
RECIPES = "kakeya-4.6x,kakeya-4.6x-trellis"
BLOCK = lib.BLOCK_TOKENS
LAYERS = 4  # of the synthetic model; copies of the data take turns
CHUNK = 8192  # tokens of a step that seals
REPLAYS = 20
WARM_UP = 3
MAX_COPIES = 512
# Splits that vLLM allows FlashAttention in a full graph (flash_attn_max_num_splits_for_cuda_graph).
FLASH_SPLITS = 32
# Relative L2. The output is bf16, which alone is 1.1e-3.
BOUND, FLASH_BOUND = 5e-3, 1e-2


class Model:
    """Shapes of a model, and keys and values like its own."""

    def __init__(
        self,
        dim: int,
        heads: int,
        group: int,
        longest: int,
        device: torch.device,
        soft_cap: float = 0.0,
    ) -> None:
        self.dim, self.heads, self.group, self.device = dim, heads, group, device
        self.soft_cap = soft_cap
        self.scale = dim**-0.5
        self.longest = longest
        self.statistics = common.Statistics(LAYERS, heads, dim)
        self.frequencies = [1e6 ** (-2 * i / dim) for i in range(dim // 2)]
        self._angles = torch.tensor(self.frequencies, dtype=torch.float64, device=device)
        tensors = self.statistics.tensors
        self._mean = tensors["k_mean"].to(device)
        self._deviation = tensors["k_var"].sqrt().to(device)
        self.random = torch.Generator(device).manual_seed(1)

    def codec(self, recipe: str) -> lib.Codec:
        model = {
            "num_layers": LAYERS,
            "num_kv_heads": self.heads,
            "num_q_heads": self.heads * self.group,
            "head_dim": self.dim,
            "max_position": self.longest + 2 * BLOCK,
            "rope": {"rotary_dim": self.dim, "interleaved": False, "inv_freq": self.frequencies},
        }
        calibrated = common.needs_calibration(recipe)
        artefact = self.statistics.artefact() if calibrated else None
        return lib.load().codec(recipe, model, artefact)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random, device=self.device).to(dtype)

    def rows(self, layer: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K after RoPE and V of tokens at positions from ``start`` on: bf16 [count, heads, D]."""
        noise = self.normal(count, self.heads, self.dim, dtype=torch.float32)
        key = self._mean[layer] + self._deviation[layer] * noise
        at = torch.arange(start, start + count, dtype=torch.float64, device=self.device)
        angle = (at[:, None] * self._angles)[:, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        x, y = key.chunk(2, -1)
        key = torch.cat((x * cos - y * sin, y * cos + x * sin), -1)
        return key.to(torch.bfloat16), self.normal(count, self.heads, self.dim)


class Cache:
    """``copies`` layers of a step in which every sequence of a batch decodes one token."""

    def __init__(
        self,
        model: Model,
        codec: Any,
        batch: int,
        context: int,
        copies: int,
        make: Any = lib.CudaCodec,
    ) -> None:
        self.model, self.batch, self.context, self.copies = model, batch, context, copies
        heads, dim, device = model.heads, model.dim, model.device
        self.per = context // BLOCK
        self.worker = make_worker(model, codec, batch, max(batch, min(CHUNK, context)), make)
        blocks = batch * self.per
        self.worker.bind(1 + blocks + batch)
        # Block 0 is vLLM's null block; then the sealed ones in any order, then the open ones.
        shuffled = 1 + torch.randperm(blocks, generator=torch.Generator().manual_seed(3))
        opened = 1 + blocks + torch.arange(batch)
        self.table = torch.cat((shuffled.view(batch, self.per), opened[:, None]), 1)
        self.table = self.table.to(device, torch.int32)
        self.worker.slots.apply(opened.tolist(), list(range(batch)))
        page = codec.page_bytes(0)
        self.layer_bytes = blocks * heads * page
        self.pages = [
            torch.zeros(1 + blocks + batch, heads, 1, page, dtype=torch.uint8, device=device)
            for _ in range(copies)
        ]
        self.layers = []
        for i in range(copies):
            pool = torch.zeros(batch + 1, 2, heads, BLOCK, dim, dtype=torch.bfloat16, device=device)
            layer = cuda.CudaLayer(
                self.worker, pool, i % LAYERS, 0, model.scale, soft_cap=model.soft_cap
            )
            self.layers.append(layer)
        self.planner = cuda.Planner(self.worker)
        for sequence in range(batch):
            for start in range(0, context, CHUNK):
                self._prefill(sequence, start, min(CHUNK, context - start))
        self._start_decoding()
        accepted(self.worker)

    def _prefill(self, sequence: int, start: int, count: int) -> None:
        """Seal tokens of one sequence in every layer."""
        row = self.table[sequence : sequence + 1]
        at = torch.arange(start, start + count, device=self.model.device)
        slots = row[0, at // BLOCK].long() * BLOCK + at % BLOCK
        step = plan(self.planner, [count], [start + count], row, slots)
        for i, layer in enumerate(self.layers):
            layer.write(step, *self.model.rows(i % LAYERS, start, count), self.pages[i])

    def _start_decoding(self) -> None:
        """The step that is timed; its tokens go into the open blocks."""
        model, batch = self.model, self.batch
        slots = self.table[:, -1].long() * BLOCK
        self.step = plan(self.planner, [1] * batch, [self.context + 1] * batch, self.table, slots)
        for i, layer in enumerate(self.layers):
            self.tokens = model.rows(i % LAYERS, self.context, batch)
            layer.write(self.step, *self.tokens, self.pages[i])
        self.query = model.normal(batch, model.heads * model.group, model.dim)
        self.out = torch.full_like(self.query, float("nan"))

    def attend(self, i: int) -> None:
        self.layers[i].attend(self.step, self.query, self.pages[i], self.out)

    def error(self, sequence: int, dtype: torch.dtype = torch.float16) -> float:
        """Relative L2 error of the last layer's output of one sequence, which attend() gave."""
        key, value = self._opened(sequence, dtype)
        key = torch.cat((key, self.tokens[0][sequence : sequence + 1].to(dtype)))
        value = torch.cat((value, self.tokens[1][sequence : sequence + 1].to(dtype)))
        want = attention(self.model, self.query[sequence], key, value)
        return relative(self.out[sequence], want)

    def _opened(self, sequence: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's sealed tokens [context, KV heads, D], as the library opens them."""
        model, pages = self.model, self.pages[-1]
        shape = (self.context, model.heads, model.dim)
        key, value = (torch.empty(shape, dtype=dtype, device=model.device) for _ in "kv")
        args = lib.CudaOpenArgs(struct_size=lib.ctypes.sizeof(lib.CudaOpenArgs))
        args.layer = (self.copies - 1) % LAYERS
        args.dtype = cuda.DTYPES[dtype]
        args.count, args.num_blocks = self.per, pages.shape[0]
        args.blocks = self.table[sequence].data_ptr()
        args.pages = pages.data_ptr()
        args.page_block_stride, args.page_head_stride = pages.stride()[:2]
        args.k, args.v = key.data_ptr(), value.data_ptr()
        args.k_token_stride, args.k_head_stride = key.stride()[:2]
        args.v_token_stride, args.v_head_stride = value.stride()[:2]
        args.stream = cuda.current_stream(model.device)
        self.worker.codec.open(args)
        return key, value


def make_worker(model: Model, codec: Any, seqs: int, tokens: int, make: Any) -> cuda.CudaWorker:
    """What an engine for ``seqs`` sequences and steps of ``tokens`` tokens would make."""
    config = SimpleNamespace(
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=tokens),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=seqs),
        model_config=SimpleNamespace(max_model_len=model.longest + 1),
    )
    worker = cuda.CudaWorker(
        config,
        codec,
        device=model.device,
        dtype=torch.bfloat16,
        num_kv_heads=model.heads,
        head_size=model.dim,
        num_open=seqs,
        make=make,
    )
    worker.live = True  # plan for the blocks given, not for a dummy run
    return worker


def accepted(worker: cuda.CudaWorker) -> None:
    if status := int(worker.status):
        raise SystemExit(f"sealing refused its input: status {status}")


def plan(
    planner: cuda.Planner,
    counts: list[int],
    lens: list[int],
    table: torch.Tensor,
    slots: torch.Tensor,
) -> cuda.KakeyaCudaMetadata:
    """Plan a step: tokens and lengths of its sequences, their blocks, and each token's place."""
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(lens, dtype=torch.int32)
    return planner.build(
        SimpleNamespace(
            query_start_loc=starts.to(table.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(table.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(counts),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(counts),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
        )
    )


def attention(
    model: Model, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Float32: query [heads, D] over key, value [tokens, KV heads, D]."""
    heads, dim = query.shape
    grouped = query.float().view(key.shape[1], heads // key.shape[1], dim)
    scores = torch.einsum("hgd,thd->hgt", grouped, key.float()) * model.scale
    if model.soft_cap:
        scores = model.soft_cap * (scores / model.soft_cap).tanh()
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), value.float()).reshape(heads, dim)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def graph_us(launch: Callable[[int], Any], copies: int) -> float:
    """Microseconds of one launch: the median over replays of a graph of launches 0 .. copies-1."""
    launch(copies - 1)  # loads what is loaded at first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            launch(i)
    times = []
    for replay in range(WARM_UP + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= WARM_UP:
            times.append(1e3 * start.elapsed_time(end) / copies)
    return statistics.median(times)


def copies_for(layer_bytes: int) -> int:
    """Layers with data of their own, so that none is still in L2 when its turn comes again."""
    cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MAX_COPIES, -(-cold // layer_bytes)))


def copy_bandwidth() -> float:
    """GB/s of a copy of 2 GB on the device, bytes read and written: the fastest of what there is.

    As a node of a graph the driver may leave the copy to an engine that is slower than the memory;
    in a stream, and as an elementwise kernel, the multiprocessors copy.
    """
    source = torch.ones(2_000_000_000 // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ways = [lambda _: target.copy_(source), lambda _: torch.neg(source, out=target)]
    best = min(stream_us(ways[0]), *(graph_us(way, 2) for way in ways))
    return 2 * source.nbytes / best / 1e3


def stream_us(launch: Callable[[int], Any]) -> float:
    """Microseconds of one launch outside of a graph, long ones only: the median."""
    times = []
    for repeat in range(WARM_UP + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(0)
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def flash_us(model: Model, batch: int, context: int, block: int) -> float:
    """vLLM's FlashAttention over a bf16 cache of blocks of ``block`` tokens, as in a full graph."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata

    device, heads, dim = model.device, model.heads, model.dim
    version = cuda.flash_version(dim)
    length = context + 1
    per = -(-length // block)
    layer = batch * per * block * heads * 2 * dim
    copies = copies_for(2 * layer)
    # As vLLM lays it out: a token's K and V of a head beside each other.
    caches = [
        torch.empty(batch * per, block, heads, 2 * dim, dtype=torch.bfloat16, device=device)
        for _ in range(copies)
    ]
    for cache in caches:
        cache.normal_(generator=model.random)
    order = torch.randperm(batch * per, generator=torch.Generator().manual_seed(4))
    table = order.view(batch, per).to(device, torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    query = model.normal(batch, heads * model.group, dim)
    out = torch.full_like(query, float("nan"))
    metadata, splits = None, 0
    if version == 3:
        splits = FLASH_SPLITS
        metadata = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=length,
            num_heads_q=heads * model.group,
            num_heads_kv=heads,
            headdim=dim,
            cache_seqlens=lens,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=block,
            causal=True,
            window_size=(-1, -1),
            has_softcap=bool(model.soft_cap),
            num_splits=splits,
        )

    def launch(i: int) -> None:
        key, value = caches[i].split(dim, dim=-1)
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=length,
            softmax_scale=model.scale,
            softcap=model.soft_cap,
            causal=True,
            window_size=[-1, -1],
            block_table=table,
            scheduler_metadata=metadata,
            fa_version=version,
            num_splits=splits,
        )

    us = graph_us(launch, copies)
    rows = caches[-1][table[-1].long()].flatten(0, 1)[:length]
    want = attention(model, query[-1], *rows.split(dim, dim=-1))
    require(relative(out[-1], want), FLASH_BOUND, f"FlashAttention {version}, {batch}x{context}")
    return us


def require(error: float, bound: float, what: str) -> None:
    if not error <= bound:  # NaN too
        raise SystemExit(f"{what}: relative error {error:.2e}, bound {bound:.0e}; no time is given")


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def flash_cell(model: Model, batch: int, context: int) -> dict[str, Any]:
    """FlashAttention at its better block size; both times are kept."""
    found = {}
    for block in (16, BLOCK):
        found[block] = flash_us(model, batch, context, block)
        free()
    best = min(found, key=found.get)
    return {"us": found[best], "block": best, "all": found}


def attention_cell(
    model: Model, codec: lib.Codec, name: str, batch: int, context: int, copy: float
) -> dict[str, Any]:
    per_layer = batch * (context // BLOCK) * model.heads * codec.page_bytes(0)
    cache = Cache(model, codec, batch, context, copies_for(per_layer))
    us = graph_us(cache.attend, cache.copies)
    error = max(cache.error(sequence) for sequence in {0, batch - 1})
    require(error, BOUND, f"{name}, head_dim {model.dim}, {batch}x{context}")
    speed = cache.layer_bytes / us / 1e3
    return {"us": us, "gb_s": speed, "of_copy": speed / copy, "error": error}


def check(model: Model, codec: lib.Codec, name: str) -> None:
    """Every sequence of a small step, before anything is timed."""
    cache = Cache(model, codec, 5, 3 * BLOCK, 2)
    for i in range(cache.copies):
        cache.attend(i)
    for sequence in range(cache.batch):
        what = f"{name}, head_dim {model.dim}, sequence {sequence} of the small step"
        require(cache.error(sequence), BOUND, what)


def seal_rows(model: Model, codec: lib.Codec) -> list[dict[str, Any]]:
    """Sealing of one layer: a prompt, steady decoding, a burst; and what comes before it."""
    block_bytes = 4 * BLOCK * model.heads * model.dim
    rows = []

    def row(what: str, us: float, blocks: int | None = None) -> None:
        speed = {} if blocks is None else {"gb_s": blocks * block_bytes / us / 1e3}
        rows.append({"what": what, "us": us, **speed})
        free()

    prompt = SealStep(model, codec, [CHUNK], [CHUNK], copies_for(CHUNK // BLOCK * block_bytes))
    row("prompt of 8,192 tokens: seal 64 blocks", graph_us(prompt.seal, prompt.copies), 64)
    del prompt
    ends = [8065 + i // 2 for i in range(256)]  # the last two have reached the end of a block
    steady = SealStep(model, codec, [1] * 256, ends, copies_for(2 * block_bytes))
    row("batch 256 decodes: seal 2 blocks", graph_us(steady.seal, steady.copies), 2)
    del steady
    every = SealStep(model, codec, [1] * 256, [8192] * 256, copies_for(256 * block_bytes))
    row("batch 256 decodes: seal all 256", graph_us(every.seal, every.copies), 256)
    row("plan of 256 sequences, once a step", graph_us(every.plan, 32))
    row("append of 256 tokens", graph_us(every.append, every.copies))
    return rows


class SealStep:
    """A step of ``counts`` tokens and ``lens`` lengths, in ``copies`` layers with input of their
    own. Blocks that a decoding step fills are in open blocks; the other sequences have none."""

    def __init__(
        self,
        model: Model,
        codec: Any,
        counts: list[int],
        lens: list[int],
        copies: int,
        make: Any = lib.CudaCodec,
    ) -> None:
        self.copies, seqs = copies, len(counts)
        device, heads, dim = model.device, model.heads, model.dim
        self.worker = make_worker(model, codec, seqs, max(sum(counts), seqs), make)
        prompt = counts[0] > 1
        columns = -(-max(lens) // BLOCK)
        if prompt:
            table = 1 + torch.arange(columns)[None]
            at = torch.arange(counts[0])
            places = (1 + at // BLOCK) * BLOCK + at % BLOCK
        else:
            # Only the last block of a sequence is written: one block each will do.
            table = 1 + torch.arange(seqs)[:, None].expand(seqs, columns)
            places = table[:, 0] * BLOCK + (torch.tensor(lens) - 1) % BLOCK
        blocks = int(table.max()) + 1
        self.worker.bind(blocks)
        full = [] if prompt else [i for i, length in enumerate(lens) if length % BLOCK == 0]
        slots = {1 + sequence: slot for slot, sequence in enumerate(full)}
        self.worker.slots.apply(list(slots), list(slots.values()))
        self.worker.slots.tensor[cuda.NULL_BLOCK] = len(full)
        self.planner = cuda.Planner(self.worker)
        table = table.to(device, torch.int32).contiguous()
        self.step = plan(self.planner, counts, lens, table, places.to(device))
        pages = torch.zeros(blocks, heads, 1, codec.page_bytes(0), dtype=torch.uint8, device=device)
        self.pages = pages
        self._keep = [table]  # the library knows addresses
        self.layers = []
        for i in range(copies):
            pool = torch.zeros(
                len(full) + 1, 2, heads, BLOCK, dim, dtype=torch.bfloat16, device=device
            )
            for slot in range(len(full)):
                rows = model.rows(i % LAYERS, max(lens) - BLOCK, BLOCK)
                pool[slot] = torch.stack(rows).transpose(1, 2)
            rows = model.rows(i % LAYERS, max(lens) - max(counts), sum(counts))
            layer = cuda.CudaLayer(self.worker, pool, i % LAYERS, 0, model.scale)
            layer.write(self.step, *rows, pages)
            self.layers.append(layer)
            self._keep += rows
        accepted(self.worker)

    def seal(self, i: int) -> None:
        self._again(self.worker.codec.seal, i)

    def append(self, i: int) -> None:
        self._again(self.worker.codec.append, i)

    def _again(self, call: Callable[[Any], None], i: int) -> None:
        # The arguments are those of layer.write in __init__, on the stream of now.
        args = self.layers[i]._write
        args.stream = cuda.current_stream(self.worker.device)
        call(args)

    def plan(self, _: int) -> None:
        args = self.planner._args
        args.stream = cuda.current_stream(self.worker.device)
        self.worker.codec.plan(args)


def report_attention(model: Model, copy: float, rows: list[dict[str, Any]]) -> str:
    version = cuda.flash_version(model.dim)
    header = ["recipe", "batch x context", "us", "GB/s of pages", "of copy"]
    header += [f"FlashAttention {version}, us", "against it"]
    lines = []
    for row in rows:
        cell = [row["recipe"], f"{row['batch']} x {row['context']:,}"]
        if "us" not in row:
            lines.append([*cell, row["left_out"], "", "", "", ""])
            continue
        flash = row["flash"]
        cell += [f"{row['us']:.1f}", f"{row['gb_s']:,.0f}", f"{100 * row['of_copy']:.1f} %"]
        cell += [f"{flash['us']:.1f} (blocks of {flash['block']})"]
        lines.append([*cell, common.ratio(flash["us"] / row["us"])])
    cap = f", soft cap {model.soft_cap:g}" if model.soft_cap else ""
    title = f"Attention, head_dim {model.dim}, {model.group} query heads a KV head{cap}"
    return f"\n{title}; copy {copy:,.0f} GB/s:\n\n" + common.table(header, lines)


def report_seal(dim: int, recipe: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["what"], f"{row['us']:.1f}", f"{row['gb_s']:,.0f}" if "gb_s" in row else ""]
        for row in rows
    ]
    title = f"\nSealing, {recipe}, head_dim {dim}, one layer:\n\n"
    return title + common.table(["step", "us", "GB/s of bf16 input"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default=RECIPES, help="names of presets, with commas")
    parser.add_argument("--head-dims", default="128,64", help="64, 96, 128, 256")
    parser.add_argument("--cells", default=CELLS, help="batch x context, with commas")
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--group", type=int, default=4, help="query heads a KV head")
    parser.add_argument("--soft-cap", type=float, default=0.0, help="of scores (0: none)")
    parser.add_argument("--no-attention", action="store_true")
    parser.add_argument("--no-seal", action="store_true")
    parser.add_argument("--out", help="also write the results here, JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    if not lib.load().cuda_archs:
        raise SystemExit("this libkakeya has no kernels: make kernels, then make setup")
    wanted = [] if arguments.no_attention else common.cells(arguments.cells)
    for _, context in wanted:
        if context % BLOCK:
            raise SystemExit(f"a context of {context} is no whole number of {BLOCK}-token blocks")
    dims = [int(dim) for dim in arguments.head_dims.split(",")]
    if unknown := set(dims) - set(lib.HEAD_DIMS):
        raise SystemExit(f"no kernels for head_dim {unknown}; valid: {lib.HEAD_DIMS}")
    recipes = arguments.recipes.split(",")
    try:
        for recipe in recipes:
            common.needs_calibration(recipe)
    except lib.KakeyaError as error:
        raise SystemExit(str(error)) from error
    results = measure(arguments, dims, recipes, wanted)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def measure(
    arguments: argparse.Namespace,
    dims: list[int],
    recipes: list[str],
    wanted: list[tuple[int, int]],
) -> dict[str, Any]:
    torch.cuda.set_device(0)
    results: dict[str, Any] = {"environment": common.environment(), "attention": [], "seal": []}
    print(json.dumps(results["environment"], indent=1), flush=True)
    results["copy_gb_s"] = copy = copy_bandwidth()
    free()
    longest = max([context for _, context in wanted] + [CHUNK])
    for dim in dims:
        device = torch.device("cuda:0")
        model = Model(dim, arguments.heads, arguments.group, longest, device, arguments.soft_cap)
        codecs = {recipe: model.codec(recipe) for recipe in recipes}
        for recipe, codec in codecs.items():
            check(model, codec, recipe)
        rows = []
        for batch, context in wanted:
            rows += attention_rows(model, codecs, batch, context, copy)
        if rows:
            rows.sort(key=lambda row: recipes.index(row["recipe"]))
            print(report_attention(model, copy, rows), flush=True)
            results["attention"] += rows
        for recipe, codec in codecs.items():
            if not arguments.no_seal:
                sealed = seal_rows(model, codec)
                print(report_seal(dim, recipe, sealed), flush=True)
                results["seal"] += [{"recipe": recipe, "head_dim": dim, **row} for row in sealed]
    return results


def attention_rows(
    model: Model, codecs: dict[str, lib.Codec], batch: int, context: int, copy: float
) -> list[dict[str, Any]]:
    """A cell for every recipe, FlashAttention measured once."""
    cell = {"head_dim": model.dim, "group": model.group, "batch": batch, "context": context}
    cell |= {"soft_cap": model.soft_cap}
    try:
        flash = flash_cell(model, batch, context)
    except torch.OutOfMemoryError:
        flash = None
    free()
    rows = []
    for recipe, codec in codecs.items():
        row = {"recipe": recipe, **cell}
        rows.append(row)
        if flash is None:
            row["left_out"] = "the bf16 cache does not fit"
            continue
        try:
            row |= {**attention_cell(model, codec, recipe, batch, context, copy), "flash": flash}
        except torch.OutOfMemoryError:
            row["left_out"] = "does not fit"
        free()
    return rows


if __name__ == "__main__":
    main()
