"""What the log says once at start-up: recipe, layers, bytes before and after, capacity."""

from __future__ import annotations

import json
from typing import Any

from kakeya_vllm import hybrid, lib
from kakeya_vllm.cuda import batch_invariant


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _layers(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def bytes_per_token(specs: list[Any], itemsize: int) -> tuple[float, float]:
    """Bytes of KV cache a token over the given layer specs: stock cache, and as configured."""
    before = sum(2 * spec.num_kv_heads * spec.head_size * itemsize for spec in specs)
    after = sum(spec.page_size_bytes / spec.block_size for spec in specs)
    return float(before), after


def compose(runtime: Any, kv_cache_config: Any) -> list[str]:
    """The lines of the banner for one worker. Numbers are this worker's: its layers and heads."""
    from kakeya_vllm.support import layer_index

    vllm_config, settings = runtime.vllm_config, runtime.settings
    specs = layer_specs(kv_cache_config)
    dtype = vllm_config.model_config.dtype
    names = layers_by_cache(runtime, specs)
    compressed, kept = ([layer_index(x) for x in names[kind]] for kind in ("compressed", "stock"))
    windowed, states, drafting = names["windowed"], names["state"], len(names["draft"])
    of_draft = f"; {drafting} of the draft model, stock" if drafting else ""
    growing = growing_specs(names, specs)
    before, after = bytes_per_token(growing, dtype.itemsize)
    pool = sum(layer.impl.open_pool.nbytes for layer in runtime.layers.values())
    slots = runtime.open_blocks.num_open if runtime.open_blocks else 0
    groups = kv_cache_config.kv_cache_groups
    block_size = groups[runtime.group].kv_cache_spec.block_size if groups else lib.BLOCK_TOKENS
    capacity = f"{kv_cache_config.num_blocks * block_size} tokens in {kv_cache_config.num_blocks} "
    capacity += f"blocks of {block_size}"
    if windowed or states:
        capacity = _shared_capacity(vllm_config, kv_cache_config, specs)
    library = lib.load()
    name = str(dtype).removeprefix("torch.")
    calibrated = settings.calibration or "no (calibration-free recipe)"
    per_token = "none on this worker"
    if after:
        ratio = f"{before / after:.2f}x"
        which = "full-attention layers" if windowed else "all layers"
        which = "attention layers" if states else which
        per_token = f"{before:.0f} in {name} -> {after:.1f}, {which} ({ratio})"
    buffers = []
    if runtime.cuda is not None:
        size = _gib(runtime.cuda.nbytes)
        buffers = [f"  GPU buffers       {size} for attention and prefill ({library.cuda_archs})"]
        if batch_invariant():
            exceptions = "but where a prompt is cut into steps or hits the prefix cache shows"
            buffers.append(f"  batch invariant   yes, {exceptions}")
    return [
        f"KAKEYA {library.version} (libkakeya {library.path}, {library.simd})",
        f"  recipe            {_recipe(runtime)}",
        f"  calibrated        {calibrated}",
        f"  layers            {len(compressed)} compressed: {_layers(compressed)}; "
        f"{len(kept)} stock {name}: {_layers(kept)}{of_draft}",
        *([f"  windows           {_windows(specs, windowed)}"] if windowed else []),
        *([f"  states            {_states(specs, states, runtime)}"] if states else []),
        f"  bytes per token   {per_token}",
        f"  prefill           {settings.prefill}",
        *(["  verify            on: pages and outputs are checked"] if settings.verify else []),
        f"  open blocks       {slots} slots, {_gib(pool)} for all layers",
        *buffers,
        f"  capacity          {capacity}",
    ]


def layers_by_cache(runtime: Any, specs: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the layers with these specs: compressed; with the stock cache: of all tokens, of
    those in a window, and a draft model's; and those that keep a state."""
    from kakeya_vllm.support import is_draft_layer

    total = runtime.vllm_config.model_config.get_total_num_hidden_layers()
    kinds = ("compressed", "stock", "windowed", "state", "draft")
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, spec in specs.items():
        kind = "stock" if getattr(spec, "sliding_window", None) is None else "windowed"
        if name in runtime.layers:
            kind = "compressed"
        elif hybrid.is_state(spec):
            kind = "state"
        elif is_draft_layer(name, total):
            kind = "draft"
        found[kind].append(name)
    return found


def growing_specs(names: dict[str, list[str]], specs: dict[str, Any]) -> list[Any]:
    """Specs of the layers whose cache grows with every token; ``names``: by cache."""
    fixed = {*names["windowed"], *names["state"]}
    return [spec for name, spec in specs.items() if name not in fixed]


def _states(specs: dict[str, Any], states: list[str], runtime: Any) -> str:
    """What the layers with a state keep, in blocks of as many bytes as ours."""
    used = max(specs[name].state_content_size_bytes for name in states)
    size = specs[states[0]].page_size_bytes
    return (
        f"{len(states)} layers keep a state; one takes a block of {runtime.pages_per_block} pages "
        f"({used / size:.0%} of its bytes)"
    )


def _windows(specs: dict[str, Any], windowed: list[str]) -> str:
    """What the sliding-window layers keep: their own dtype, in blocks of as many bytes as ours."""
    spec = specs[windowed[0]]
    used = spec.unpadded_page_size_bytes / spec.page_size_bytes
    return (
        f"{len(windowed)} sliding-window layers keep the stock cache of {spec.sliding_window} "
        f"tokens, {spec.block_size} a block ({used:.0%} of its bytes)"
    )


def _shared_capacity(vllm_config: Any, kv_cache_config: Any, specs: dict[str, Any]) -> str:
    """Layers of several kinds draw from one pool: how many tokens fit depends on how long requests
    are. vLLM's own figure is for the longest; beside it what the bytes would hold uncompressed,
    since the recipe's ratio is that of some layers only."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    longest = vllm_config.model_config.max_model_len
    fit = get_max_concurrency_for_kv_cache_config(vllm_config, kv_cache_config)
    item = vllm_config.model_config.dtype.itemsize
    stock = sum(_stock_bytes(spec, vllm_config, item) for spec in specs.values())
    # Every tensor names the one allocation that all of them lie in.
    pool = max(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
    uncompressed = int(pool / stock * longest)
    return (
        f"{int(fit * longest)} tokens in requests of {longest}, about {uncompressed} uncompressed "
        f"({kv_cache_config.num_blocks} blocks that all kinds of layers share)"
    )


def _stock_bytes(spec: Any, vllm_config: Any, item: int) -> int:
    """Bytes that a layer keeps of the longest request with the stock cache, without padding."""
    blocks = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
    if hybrid.is_state(spec):
        return blocks * spec.state_content_size_bytes
    windowed = getattr(spec, "sliding_window", None) is not None
    tokens = blocks * spec.block_size if windowed else vllm_config.model_config.max_model_len
    return tokens * 2 * spec.num_kv_heads * spec.head_size * item


def layer_specs(kv_cache_config: Any) -> dict[str, Any]:
    """KV-cache spec by layer name, with groups of differing pages taken apart."""
    specs: dict[str, Any] = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        per_layer = getattr(spec, "kv_cache_specs", None) or {}
        for name in group.layer_names:
            specs[name] = per_layer.get(name, spec)
    return specs


def _recipe(runtime: Any) -> str:
    if runtime.codec is None:
        return "none in use: every layer of this worker keeps the stock cache"
    about = runtime.codec.describe()
    parts = [str(about.get("name", "unnamed"))]
    if "ratio" in about:
        parts.append(f"{about['ratio']:.2f}x")
    if "quantizer" in about:
        quantizer = about["quantizer"]
        parts.append(quantizer if isinstance(quantizer, str) else json.dumps(quantizer))
    tokens = runtime.settings.block_tokens
    parts.append(f"{about['page_bytes']} B a page of {tokens} tokens and one KV head")
    if about.get("fingerprint"):
        parts.append(f"tables {str(about['fingerprint'])[:16]}")
    return ", ".join(parts)


def log(runtime: Any, kv_cache_config: Any) -> None:
    """Write the banner to vLLM's log; only the first tensor-parallel rank does."""
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.logger import init_logger

    if get_tensor_model_parallel_rank() == 0:
        init_logger("vllm.kakeya").info("%s", "\n".join(compose(runtime, kv_cache_config)))
