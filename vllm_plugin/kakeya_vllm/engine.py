"""A vLLM engine inside this process, laid open for measuring.

Calibration and evaluation read tensors in the middle of a step. That needs the model in this
process (no engine-core child), eager execution (hooks do not run inside compiled graphs) and
steps whose make-up is known (one request at a time, 2,048 tokens a step, no prefix hits).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

# Cache of an engine that holds one passage; on the CPU VLLM_CPU_KVCACHE_SPACE says the same.
CACHE_BYTES = 2**30
# Tokens of a step; also the clean prefix of an evaluated passage. 16 blocks of 128.
CHUNK = 2048
# Positions of an engine by default: a passage and what follows it.
MODEL_LEN = CHUNK + CHUNK // 8


def prepare_environment() -> None:
    """Environment of an in-process engine. Call before the first import of torch or vllm."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On the CPU vLLM would otherwise claim a share of all memory, and refuses to start where less
    # than that is free.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # torch, vLLM's operators and libkakeya each have their own threads. OpenMP threads that wait by
    # spinning take the cores from the others: tokens then come several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    # vLLM configures logging when it is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def speed_up_bf16() -> None:
    """On a CPU without AVX-512, route bf16 matrix products through fp32 ones.

    torch's bf16 product falls back to a scalar routine there, several times slower than fp32. The
    routine accumulates in fp32 and rounds once; so does this, hence the model stays a bf16 model.
    Costs four bytes more a weight. Only measuring engines do so; those of users are not touched.
    """
    import torch
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    original = utils.dispatch_cpu_unquantized_gemm
    if (
        not current_platform.is_cpu()
        or torch.cpu._is_avx512_supported()
        or hasattr(original, "kakeya")
    ):
        return

    def dispatch(layer, remove_weight):
        original(layer, remove_weight)
        weight = layer.weight
        # A packed kernel took the weight over and left an empty one: that is a fast path, keep it.
        if weight.dtype is not torch.bfloat16 or weight.ndim != 2 or not weight.numel():
            return
        wide = weight.detach().float()

        def product(x, _weight, bias):
            bias = None if bias is None else bias.float()
            return torch.nn.functional.linear(x.float(), wide, bias).to(x.dtype)

        layer.cpu_linear = product

    dispatch.kakeya = True
    # Layers import it by name when they load their weights, so replacing it in its module reaches
    # them all.
    utils.dispatch_cpu_unquantized_gemm = dispatch


def in_process_engine(model: str, backend: str | None = None, **settings: Any):
    """`vllm.LLM` for `model` in this process.

    `backend` names the attention backend; "environment" leaves it to VLLM_ATTENTION_BACKEND, as a
    user's engine would, and None is vLLM's own choice whatever that variable says.
    """
    if backend != "environment":
        os.environ.pop("VLLM_ATTENTION_BACKEND", None)
        # Calibration and simulated caches compute in float64, which vLLM's batch-invariant products
        # are not made for.
        os.environ.pop("VLLM_BATCH_INVARIANT", None)
    prepare_environment()
    from vllm import LLM

    speed_up_bf16()
    arguments: dict[str, Any] = {
        "model": model,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": CHUNK,
        "max_model_len": MODEL_LEN,
        "seed": 0,
        "disable_log_stats": True,
    }
    if backend not in (None, "environment"):
        arguments["attention_backend"] = backend
    arguments.update(settings)
    return LLM(**_memory(arguments), **arguments)


def _memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings by which an engine on a GPU takes no more memory than it needs: by itself vLLM takes
    nearly all, and refuses to start where another process has some."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return {}
    free, total = torch.cuda.mem_get_info()
    found: dict[str, Any] = {"gpu_memory_utilization": min(0.9, 0.95 * free / total)}
    if arguments["max_num_seqs"] == 1 and arguments["max_model_len"] == MODEL_LEN:
        # The share then only has to be free at the start; others may be starting as well.
        found = {"gpu_memory_utilization": 0.5 * free / total, "kv_cache_memory_bytes": CACHE_BYTES}
    return {name: value for name, value in found.items() if name not in arguments}


def on_model(llm, function: Callable) -> Any:
    """`function(model)` on the torch module of the (only) worker."""
    return llm.apply_model(function)[0]


def attention_layers(model) -> list[tuple[str, Any]]:
    """(name, module) of the decoder's attention layers in the order of the layers; names are
    those that vLLM gave them, mostly their places in the model."""
    from vllm.model_executor.layers.attention import Attention

    return [
        (module.layer_name, module) for module in model.modules() if isinstance(module, Attention)
    ]


def compressed_layers(model) -> list[tuple[int, str, Any]]:
    """(number, name, module) of the attention layers that KAKEYA compresses: those that keep every
    token. Where a model mixes kinds, sliding-window layers are left out."""
    from kakeya_vllm.support import layer_index

    return [
        (layer_index(name), name, module)
        for name, module in attention_layers(model)
        if module.sliding_window is None
    ]


def run_prompt(llm, tokens: Sequence[int]) -> None:
    """Prefill `tokens`; the one token that the engine samples afterwards is dropped."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate({"prompt_token_ids": list(tokens)}, parameters, use_tqdm=False)


def cache_figures(llm) -> dict[str, Any]:
    """What vLLM allocated for the KV cache: bytes, blocks, tokens of capacity and bytes per
    token."""
    config = llm.llm_engine.vllm_config
    (cache,) = llm.collective_rpc(lambda worker: worker.model_runner.kv_cache_config)
    # Every tensor names the one allocation that all of them lie in (vLLM's allocate_kv_cache).
    (allocated,) = {tensor.size for tensor in cache.kv_cache_tensors}
    blocks, block = cache.num_blocks, config.cache_config.block_size
    return {
        "kv_cache_bytes": allocated,
        "num_blocks": blocks,
        "block_size": block,
        "capacity_tokens": blocks * block,
        "bytes_per_token": allocated / (blocks * block),
    }
