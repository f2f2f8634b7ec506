"""Engines for the tests: a tiny random model, how a run is made and how two are compared.

Engines run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that a test can look into the
worker. For what needs processes of its own, :func:`run_elsewhere` runs this file as a script.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 128

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


# Where results are compared bit for bit on a GPU: products that do not depend on the batch.
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}

# Drafts from the prompt itself, and vLLM's counters of how many there were and how many were right.
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
DRAFT_COUNTERS = [
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
]

_closed: list[Any] = []
KV_BYTES = 2**28  # KV cache of an engine: enough for every test, small enough to keep several


@functools.cache
def on_gpu() -> bool:
    """Whether vLLM runs on an NVIDIA GPU here."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


def need_gpus(count: int) -> None:
    """Skip the test where vLLM runs on fewer GPUs. On the CPU ranks are processes."""
    import pytest
    import torch

    if on_gpu() and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


# Of a GPU's memory, for an engine beside what others hold.
GPU_SHARE = 0.1


def memory_arguments() -> list[str]:
    """What a command line of vLLM needs besides, where other engines hold memory."""
    return ["--gpu-memory-utilization", str(GPU_SHARE)] if on_gpu() else []


def exact_dtype() -> str:
    """The type in which the model's products do not depend on how requests are batched: float32 on
    the CPU; on a GPU any, under INVARIANT."""
    return "bfloat16" if on_gpu() else "float32"


@dataclass
class Run:
    """One finished request: tokens, the log-probability of each, and its prefix-cache hits."""

    tokens: list[int]
    logprobs: list[float]
    cached: int
    text: str


class Engine:
    """An in-process vLLM engine. Not to be used after close()."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "disable_log_stats": False,
            "kv_cache_memory_bytes": KV_BYTES,
            "attention_backend": "KAKEYA",
        }
        if on_gpu():
            defaults["gpu_memory_utilization"] = GPU_SHARE
        options = defaults | options
        if options["attention_backend"] is None:
            del options["attention_backend"]
        self.llm = LLM(str(model), **options)

    def run(
        self,
        prompts: list[list[int]] | list[str],
        max_tokens: int | list[int] = 16,
        **sampling: Any,
    ) -> list[Run]:
        """Greedy completions of all prompts, in one generate call."""
        from vllm import SamplingParams

        counts = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        params = [
            SamplingParams(temperature=0, max_tokens=n, logprobs=1, ignore_eos=True, **sampling)
            for n in counts
        ]
        inputs = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [to_run(output) for output in outputs]

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Log-probability of every prompt token but the first."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return [
            entry[token].logprob
            for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]

    def worker(self, function: Callable[[Any], Any]) -> Any:
        """function(worker) in the worker."""
        return self.llm.collective_rpc(function)[0]

    @property
    def runtime(self) -> Any:
        return self.worker(lambda worker: worker._kakeya)

    @property
    def open_blocks(self) -> Any:
        return self.runtime.open_blocks

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds, by vLLM's own block count."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def counter(self, name: str) -> int:
        """Value of one of vLLM's own counters, e.g. vllm:num_preemptions."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def reset_prefix_cache(self) -> None:
        assert self.llm.reset_prefix_cache()

    def close(self) -> None:
        """End of use. The engine object stays alive until the process ends: when an in-process
        engine is destroyed, vLLM takes down process groups that other engines share. Its caches do
        not: dozens of engines would fill the machine."""
        with contextlib.suppress(Exception):  # an engine that a test broke may not answer
            self.worker(_drop_caches)
        _closed.append(self.llm)
        del self.llm


def _drop_caches(worker: Any) -> None:
    """Let go of a worker's KV cache and open blocks, and of the KV connector, which vLLM keeps for
    the process and would give to its next engine."""
    import torch
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    context = worker.vllm_config.compilation_config.static_forward_context
    for layer in context.values():
        for owner, name in ((layer, "kv_cache"), (getattr(layer, "impl", None), "open_pool")):
            if hasattr(owner, name):
                setattr(owner, name, torch.empty(0))
    worker.model_runner.kv_caches.clear()


def to_run(output: Any) -> Run:
    """vLLM's RequestOutput as a Run."""
    completion = output.outputs[0]
    chosen = [
        entry[token].logprob
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return Run(list(completion.token_ids), chosen, output.num_cached_tokens or 0, completion.text)


@contextlib.contextmanager
def engine(
    model: str | Path, env: dict[str, str] | None = None, **options: Any
) -> Iterator[Engine]:
    """An engine for the length of a with block, built under extra environment variables."""
    with variables(env or {}):
        made = Engine(model, **options)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def variables(env: dict[str, str]) -> Iterator[None]:
    """Environment variables for the length of a with block."""
    saved = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def tokens(seed: int, count: int, vocab: int = 512) -> list[int]:
    """A prompt of random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(3, vocab) for _ in range(count)]


def assert_same_run(a: Run, b: Run, tolerance: float) -> None:
    """Two greedy runs agree: same tokens, log-probabilities within ``tolerance``.

    Where the tokens part, the two candidates must have been closer than the tolerance; what
    follows is then a different text and is not compared.
    """
    for i, (s, t) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        assert abs(a.logprobs[i] - b.logprobs[i]) <= tolerance, (
            f"token {i}: log-probabilities {a.logprobs[i]} and {b.logprobs[i]} ({s}, {t})"
        )
        if s != t:
            return


def make_tiny_model(directory: Path, *, kv_heads: int = 2, **overrides: Any) -> Path:
    """A random Qwen2-like model: head_dim 128, QKV bias, 4 layers, 4 query heads.

    No tokenizer: pass skip_tokenizer_init=True and token ids. Weights are scaled so that attention
    matters and logits are not nearly equal.
    """
    import torch
    from safetensors.torch import save_file

    hidden, layers, heads, head_dim, inner, vocab = 512, 4, 4, 128, 768, 512
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": vocab,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    generator = torch.Generator().manual_seed(1)

    def weight(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)

    state = {
        "model.embed_tokens.weight": weight(vocab, hidden, 16.0),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weight(vocab, hidden, 3.0),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows, gain in (("q", heads, 1.0), ("k", kv_heads, 1.0), ("v", kv_heads, 1.0)):
            state[f"{layer}self_attn.{name}_proj.weight"] = weight(rows * head_dim, hidden, gain)
            bias = torch.randn(rows * head_dim, generator=generator)
            state[f"{layer}self_attn.{name}_proj.bias"] = bias * (1.0 if name == "k" else 0.2)
        state[f"{layer}self_attn.o_proj.weight"] = weight(hidden, heads * head_dim, 2.0)
        state[f"{layer}mlp.gate_proj.weight"] = weight(inner, hidden)
        state[f"{layer}mlp.up_proj.weight"] = weight(inner, hidden)
        state[f"{layer}mlp.down_proj.weight"] = weight(hidden, inner)
        state[f"{layer}input_layernorm.weight"] = torch.ones(hidden)
        state[f"{layer}post_attention_layernorm.weight"] = torch.ones(hidden)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file({k: v.contiguous() for k, v in state.items()}, directory / "model.safetensors")
    return directory


def add_byte_tokenizer(directory: Path) -> Path:
    """Give a model of make_tiny_model a tokenizer: one token a byte, ids 3 to 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 3 for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


def read_pages(worker: Any) -> dict[str, list[list[str]]]:
    """Pages of all blocks that were ever sealed, by number of the layer: [block][head], as hex. Of
    the compressed layers that this worker has.

    The cache starts as zeros and no page is all zero. (A finished request's blocks cannot be
    asked for here: a spawned engine tells the worker at once that it has finished.)
    """
    found = {}
    for name, layer in worker._kakeya.layers.items():
        cache = layer.kv_cache.cpu()
        sealed = cache.flatten(1).any(dim=1).nonzero().flatten().tolist()
        (number,) = [part for part in name.split(".") if part.isdigit()]
        found[number] = [[bytes(page).hex() for page in cache[b, :, 0].numpy()] for b in sealed]
    return found


def make_stage_buffers(worker: Any) -> None:
    """What later pipeline stages receive into. vLLM makes it in a dummy run, which its CPU worker
    (0.32) leaves out where nothing is compiled; the first step then fails with any cache."""
    worker.model_runner.profile_run()


def run_elsewhere(
    model: Path,
    prompts: list[Any],
    max_tokens: int,
    *,
    env: dict[str, str] | None = None,
    pages: bool = False,
    counters: list[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Engine.run in a process of its own: {"runs", "pages" (read_pages) by rank, "counters"}."""
    job = {
        "model": str(model),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "pages": pages,
        "counters": counters or [],
        "options": options,
    }
    # In front of what is there: vLLM itself may be found that way.
    path = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with variables({"PYTHONPATH": path} | (env or {})):
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(job)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    results = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not results:
        raise RuntimeError(f"the engine failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    result = json.loads(results[-1].removeprefix(_RESULT))
    result["runs"] = [Run(**run) for run in result["runs"]]
    return result


_RESULT = "RESULT "


def main() -> None:
    """Run the job in the first argument; see run_elsewhere."""
    job = json.loads(sys.argv[1])
    made = Engine(job["model"], **job["options"])
    if job["options"].get("pipeline_parallel_size", 1) > 1 and not on_gpu():
        made.llm.collective_rpc(make_stage_buffers)
    runs = made.run(job["prompts"], job["max_tokens"])
    pages = made.llm.collective_rpc(read_pages) if job["pages"] else None
    result = {
        "runs": [asdict(run) for run in runs],
        "pages": pages,
        "counters": {name: made.counter(name) for name in job["counters"]},
    }
    print(_RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    # Under its module name, so that a worker can unpickle read_pages.
    import engines

    engines.main()
