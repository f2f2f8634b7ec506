"""Tiny random hybrid models: attention layers beside layers that keep a state. Made and measured as
those of mixed.py."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engines
import mixed

COMMON = {name: value for name, value in mixed.COMMON.items() if name != "sliding_window"}
FULL = mixed.FULL
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MAMBA2 = {  # a state of 4 heads x 64 x 32, a convolution over 4 tokens
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_expand": 1,
    "mamba_chunk_size": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    # Short convolutions. vLLM's CPU kernels turn its keys wrongly (test_probe.py).
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "head_dim": 64,
        "layer_types": ["conv", FULL, "conv", FULL],
        "rope_parameters": ROPE,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 256,
        "conv_dim_out": 256,
        "norm_eps": 1e-5,
        "block_dim": 256,
        "block_ff_dim": 512,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    # Gated delta net, gated attention, partial rotary embedding, experts. vLLM's kernel for the CPU
    # takes bfloat16 only.
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "head_dim": 128,
        "layer_types": ["linear_attention", FULL, "linear_attention", FULL],
        "partial_rotary_factor": 0.25,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.25},
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "torch_dtype": "bfloat16",
    },
    # Mamba 2.
    "granite": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "head_dim": 64,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "position_embedding_type": "rope",
        "rope_parameters": ROPE,
        "attention_multiplier": 0.125,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 512,
        **MAMBA2,
    },
    # Attention and Mamba 2 in every layer.
    "falcon_h1": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "head_dim": 64,
        "rope_parameters": ROPE,
        "mamba_d_ssm": 256,
        **MAMBA2,
    },
}


# vLLM has no batch-invariant states.
EXACT = {} if engines.on_gpu() else mixed.EXACT
CHECKED = EXACT | {"KAKEYA_VERIFY": "1"}
# Of engines: kernels of the gated delta net that need nothing beside vLLM.
OPTIONS: dict[str, Any] = {"gdn_prefill_backend": "triton"} if engines.on_gpu() else {}


def make(directory: Path, name: str) -> Path:
    """A random instance of ``MODELS[name]``."""
    return mixed.instance(directory, COMMON | MODELS[name])


def attention_layers(name: str) -> list[int]:
    """Numbers of the layers with attention."""
    kinds = MODELS[name].get("layer_types", [FULL] * COMMON["num_hidden_layers"])
    return [i for i, kind in enumerate(kinds) if kind in (FULL, "attention")]


def twice(model: Path) -> dict[str, Any]:
    """What requests say one after the other, and the same again, with prefix hits; tokens of a
    block, and pages."""
    options = mixed.OPTIONS | OPTIONS
    options |= {"dtype": mixed.dtype_of(model), "enable_prefix_caching": True}
    runs = []
    with engines.engine(model, CHECKED, **options) as engine:
        for prompt in 2 * mixed.prompts():
            runs += engine.run([prompt], 40)
        block = engine.llm.llm_engine.vllm_config.cache_config.block_size
        pages = engine.runtime.pages_per_block
    half = len(runs) // 2
    first, second = ([asdict(run) for run in part] for part in (runs[:half], runs[half:]))
    return {"first": first, "second": second, "block": block, "pages": pages}


if __name__ == "__main__":
    print(json.dumps(twice(Path(sys.argv[1]))), flush=True)
