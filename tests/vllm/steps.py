"""Steps of an engine without an engine: scheduler outputs and metadata for random requests, run
through the CUDA side of the plugin and compared with attention over all tokens."""

from __future__ import annotations

import ctypes
import zlib
from types import SimpleNamespace
from typing import Any

import fake_cuda
import torch
from kakeya_vllm import cuda, lib
from kakeya_vllm.open_blocks import OpenBlocks

BLOCK = lib.BLOCK_TOKENS
HEADS, GROUP, DIM = 2, 2, 64


def settings(drafts: int = 0, max_seqs: int = 8, max_tokens: int = 1024) -> Any:
    speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
    return SimpleNamespace(
        speculative_config=speculative,
        scheduler_config=SimpleNamespace(max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=16),
        model_config=SimpleNamespace(max_model_len=2048),
    )


class Engine:
    """Requests of random tokens through scheduler outputs, OpenBlocks, planner and one layer.

    Without a codec: on the CPU over exact pages. With one: on the first GPU, with the kernels.
    """

    def __init__(
        self,
        drafts: int = 0,
        num_blocks: int = 64,
        codec: Any = None,
        heads: int = HEADS,
        group: int = GROUP,
        dim: int = DIM,
        dtype: torch.dtype = torch.bfloat16,
        repeatable: bool = False,
        soft_cap: float = 0.0,
        with_sinks: bool = False,
    ) -> None:
        """``repeatable``: a request's tokens are the same however they come in steps."""
        config = settings(drafts)
        num_open = 24
        self.codec, self.heads, self.group, self.dim, self.dtype = codec, heads, group, dim, dtype
        self.device = torch.device("cuda:0" if codec else "cpu")
        shape = {"head_dim": dim, "num_kv_heads": heads, "num_q_heads": heads * group}
        self.worker = cuda.CudaWorker(
            config,
            codec or shape,
            device=self.device,
            dtype=dtype,
            num_kv_heads=heads,
            head_size=dim,
            num_open=num_open,
            make=lib.CudaCodec if codec else fake_cuda.FakeCudaCodec,
        )
        self.worker.bind(num_blocks)
        self.open_blocks = OpenBlocks(num_blocks, num_open, lookback=2 * drafts)
        self.planner = cuda.Planner(self.worker)
        pool = torch.full((num_open + 1, 2, heads, BLOCK, dim), float("nan"), dtype=dtype)
        pool[num_open] = 0
        self.scale = dim**-0.5
        self.soft_cap = soft_cap
        # From hardly seen to more than all keys.
        self.sinks = torch.linspace(-2.0, 7.0, heads * group) if with_sinks else None
        self.layer = cuda.CudaLayer(
            self.worker,
            pool.to(self.device),
            0,
            0,
            self.scale,
            soft_cap=soft_cap,
            sinks=None if self.sinks is None else self.sinks.to(self.device),
        )
        page = codec.page_bytes(0) if codec else self.worker.codec.page_bytes
        self.pages = torch.zeros(num_blocks, heads, 1, page, dtype=torch.uint8, device=self.device)
        self.free = list(range(num_blocks - 1, 0, -1))
        self.tokens: dict[str, torch.Tensor] = {}  # K and V, [2, tokens, heads, D]
        self.blocks: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.random = torch.Generator().manual_seed(1)
        self.repeatable = repeatable
        self.outputs: dict[str, torch.Tensor] = {}  # of the last step, [tokens, query heads, D]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def request(self, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Query [count, query heads, D], K and V [2, count, heads, D] of a request's tokens."""
        queries = self.heads * self.group
        if not self.repeatable:
            return self.draw(count, queries, self.dim), self.draw(2, count, self.heads, self.dim)
        rows = []
        for position in range(self.computed[name], self.computed[name] + count):
            seed = zlib.crc32(f"{name} {position}".encode())
            shape = queries + 2 * self.heads, self.dim
            rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        q, k, v = torch.stack(rows).to(self.dtype).split([queries, self.heads, self.heads], 1)
        return q, torch.stack((k, v))

    def step(
        self, counts: dict[str, int], *, pad_seqs: int = 0, pad_tokens: int = 0, slack: int = 0
    ) -> None:
        """Run some requests for some tokens each and compare with attention over all tokens.
        ``slack``: by how much the host overrates lengths of decoding requests."""
        new, cached = [], []
        for name, count in counts.items():
            known = self.blocks.setdefault(name, [])
            start = self.computed.setdefault(name, 0)
            fresh = [self.free.pop() for _ in range(-(-(start + count) // BLOCK) - len(known))]
            known += fresh
            if start == 0 and name not in self.tokens:
                self.tokens[name] = torch.empty(2, 0, self.heads, self.dim, dtype=self.dtype)
                request = SimpleNamespace(
                    req_id=name, block_ids=(list(known),), num_computed_tokens=0
                )
                new.append(request)
            else:
                cached.append((name, (fresh,) if fresh else None, start))
        output = SimpleNamespace(
            finished_req_ids=set(),
            preempted_req_ids=set(),
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, _, _ in cached],
                new_block_ids=[blocks for _, blocks, _ in cached],
                num_computed_tokens=[start for _, _, start in cached],
                resumed_req_ids=set(),
            ),
            num_scheduled_tokens=counts,
        )
        self.open_blocks.update(output)
        self.worker.before_step(self.open_blocks)

        order = sorted(counts, key=counts.get)  # decodes first, as the runner does
        total = sum(counts.values())
        starts, lens, slots = [0], [], []
        table = torch.zeros(len(order) + pad_seqs, 16, dtype=torch.int32)
        queries, keys = zip(*(self.request(name, counts[name]) for name in order), strict=True)
        for i, name in enumerate(order):
            start, count = self.computed[name], counts[name]
            self.tokens[name] = torch.cat((self.tokens[name][:, :start], keys[i]), 1)
            starts.append(starts[-1] + count)
            lens.append(start + count)
            table[i, : len(self.blocks[name])] = torch.tensor(self.blocks[name])
            slots += [
                self.blocks[name][p // BLOCK] * BLOCK + p % BLOCK
                for p in range(start, start + count)
            ]
        starts += [total] * pad_seqs
        k, v = torch.cat((*keys, self.draw(2, pad_tokens, self.heads, self.dim)), 1)
        q = torch.cat((*queries, self.draw(pad_tokens, self.heads * self.group, self.dim)))
        bound = [n + slack * (counts[name] == 1) for n, name in zip(lens, order, strict=True)]
        metadata = self.planner.build(
            SimpleNamespace(
                query_start_loc=torch.tensor(starts, dtype=torch.int32).to(self.device),
                query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
                seq_lens=torch.tensor(lens + [0] * pad_seqs, dtype=torch.int32).to(self.device),
                seq_lens_cpu_upper_bound=torch.tensor(bound + [0] * pad_seqs, dtype=torch.int32),
                num_reqs=len(order) + pad_seqs,
                num_actual_tokens=total + pad_tokens,
                max_query_len=max(counts.values()),
                block_table_tensor=table.to(self.device),
                slot_mapping=torch.tensor(slots + [-1] * pad_tokens, dtype=torch.int64).to(
                    self.device
                ),
                causal=True,
            )
        )
        out = torch.full_like(q, float("nan")).to(self.device)
        q_, k_, v_ = (x.to(self.device) for x in (q, k, v))
        self.layer.write(metadata, k_, v_, self.pages)
        self.layer.read(metadata, q_, k_, v_, self.pages, out)
        self.worker.live = False
        out = out.cpu()
        self.outputs = {}
        for i, name in enumerate(order):
            here = slice(starts[i], starts[i + 1])
            want = self._expected(name, q[here], lens[i])
            torch.testing.assert_close(out[here], want, rtol=2e-2, atol=2e-2)
            self.outputs[name] = out[here]
            self._check_pages(name, self.computed[name], lens[i])
            self.computed[name] += counts[name]

    def _expected(self, name: str, q: torch.Tensor, length: int) -> torch.Tensor:
        """Attention of a request's step. A prompt's tokens see each other raw and pages before
        them; a decoding token, also where drafts reach into the next block, pages for all blocks
        before its own."""
        history = length - len(q)
        if len(q) > self.worker.max_query:
            return self._causal(q, self._as_read(name, history))
        parts = []
        for own in range(history // BLOCK, (length - 1) // BLOCK + 1):
            first, end = max(history, own * BLOCK), min(length, (own + 1) * BLOCK)
            read = self._as_read(name, own * BLOCK)[:, :end]
            parts.append(self._causal(q[first - history : end - history], read))
        return torch.cat(parts)

    def _causal(self, q: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        rest = self.scale, True, self.soft_cap, self.sinks
        return fake_cuda.attention(q, *keys_values, *rest)[0]

    def _as_read(self, name: str, history: int) -> torch.Tensor:
        """K and V as a token sees them that reads pages for what history's full blocks hold."""
        raw = self.tokens[name].float()
        if self.codec is None:
            return raw
        pages = self.pages.cpu()
        k, v = (torch.empty(BLOCK, self.dim) for _ in "kv")
        for index in range(history // BLOCK):
            rows = slice(index * BLOCK, (index + 1) * BLOCK)
            for head in range(self.heads):
                page = pages[self.blocks[name][index], head, 0].contiguous()
                addresses = page.data_ptr(), page.numel(), k.data_ptr(), v.data_ptr(), k.numel()
                self.codec.open(0, head, *addresses)
                raw[0, rows, head], raw[1, rows, head] = k, v
        return raw

    def _check_pages(self, name: str, before: int, after: int) -> None:
        """Pages that a step filled are the codec's, byte for byte."""
        if self.codec is None:
            return
        size = self.codec.page_bytes(0)
        for index in range(before // BLOCK, after // BLOCK):
            k, v = (x.contiguous() for x in self.tokens[name][:, index * BLOCK :][:, :BLOCK])
            want = torch.zeros(self.heads, size, dtype=torch.uint8)
            strides = self.heads * self.dim, self.dim
            dtype = cuda.DTYPES[self.dtype]
            head = ctypes.sizeof(lib.SealArgs), 0, 0, self.heads, dtype, index
            self.codec.seal(
                lib.SealArgs(
                    *head, k.data_ptr(), v.data_ptr(), *strides, *strides, want.data_ptr(), size
                )
            )
            found = self.pages[self.blocks[name][index], :, 0].cpu()
            assert torch.equal(found, want), f"page {index} of {name} differs from the codec's"
