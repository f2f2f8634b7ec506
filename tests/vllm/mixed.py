"""Tiny random models that mix full-attention and sliding-window layers, with weights that their
architecture asks for, and what is measured of them. No tokenizer: token ids.

Measured by this file as a script: a model with experts needs process groups that an engine before
it in the same process did not make.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
from kakeya_vllm import lib, support

WINDOW = 128
VOCABULARY = 512
COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {"rope_type": "default"}
MODELS: dict[str, dict[str, Any]] = {
    # Norms of q and k, two rotary embeddings, head_dim 256.
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "rope_parameters": {
            FULL: ROPE | {"rope_theta": 1e6},
            SLIDING: ROPE | {"rope_theta": 1e4},
        },
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # A soft cap of scores.
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # Sinks, YaRN, experts.
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": 64,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 256,
        "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 1024,
            "truncate": False,
        },
    },
}


def make(directory: Path, name: str) -> Path:
    """A random instance of ``MODELS[name]``."""
    return instance(directory, COMMON | MODELS[name])


def instance(
    directory: Path,
    about: dict[str, Any],
    *,
    sharpened: tuple[str, ...] = ("q_proj", "k_proj", "o_proj"),
    bias: float = 0.0,
) -> Path:
    """A random model with this config.json, as transformers initialises and saves it, with weights
    scaled so that attention matters and logits are not nearly equal. ``sharpened``: parts of the
    names of weights that decide where attention looks; ``bias``: size of biases, 0 to leave them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about, indent=1))
    config = AutoConfig.from_pretrained(directory)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "sinks" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator))
            elif weight.dim() >= 2:
                gain = 3.0 if any(part in key for part in sharpened) else 1.0
                size = weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain * size)
            elif bias and key.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * bias)
    model.save_pretrained(directory)
    # What the architecture was made from, not what transformers writes of it.
    (directory / "config.json").write_text(json.dumps(about, indent=1))
    return directory


LENGTHS = [300, 45, 129, 700]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_batched_tokens": 256}
# Under which a prompt is the same in pieces and whole, alone and in company.
EXACT = engines.INVARIANT if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
RATIOS = ("2.7x", "6.4x")


def prompts() -> list[list[int]]:
    return [engines.tokens(70 + i, n) for i, n in enumerate(LENGTHS)]


def measure(model: Path, env: dict[str, str], **more: Any) -> dict[str, Any]:
    """What the model says of the prompts (log-probabilities by token) with the stock cache and at
    two ratios, checked by KAKEYA_VERIFY; compressed layers, and the KV-cache groups. ``env`` and
    ``more``: variables and options of the engines."""
    options = OPTIONS | {"dtype": dtype_of(model)} | more
    stock = {"attention_backend": None, "block_size": lib.BLOCK_TOKENS}
    with engines.engine(model, env, **options | stock) as engine:
        found: dict[str, Any] = {"stock": [engine.prompt_logprobs(p) for p in prompts()]}
    for ratio in RATIOS:
        recipe = {"KAKEYA_RECIPE": f"kakeya-free-{ratio}", "KAKEYA_VERIFY": "1"}
        with engines.engine(model, env | recipe, **options) as engine:
            found[ratio] = [engine.prompt_logprobs(p) for p in prompts()]
            engine.run(prompts(), 8)
            found["compressed"] = [support.layer_index(name) for name in engine.runtime.layers]
            found["checked"] = engine.runtime.verifier.counts
            specs = engine.worker(_specs)
            found["groups"] = [
                {
                    "kind": type(spec).__name__,
                    "window": getattr(spec, "sliding_window", None),
                    "block": spec.block_size,
                    "bytes": spec.page_size_bytes,
                    "used": _used(spec),
                }
                for spec in specs
            ]
    return found


def dtype_of(model: Path) -> str:
    """The type to run it in: what is exact, if its kernels on the CPU take that."""
    own = json.loads((model / "config.json").read_text())["torch_dtype"]
    return engines.exact_dtype() if engines.on_gpu() else own


def _used(spec: Any) -> int:
    """Bytes of a block that are not padding."""
    kept = getattr(spec, "unpadded_page_size_bytes", None)  # a state has no pages
    return spec.state_content_size_bytes if kept is None else kept


def apart(first: list[list[float]], second: list[list[float]]) -> float:
    """Root mean square difference of log-probabilities."""
    differences = [
        (a - b) ** 2
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return (sum(differences) / len(differences)) ** 0.5


def _specs(worker: Any) -> list[Any]:
    return [group.kv_cache_spec for group in worker.model_runner.kv_cache_config.kv_cache_groups]


def measured(model: Path, env: dict[str, str] = EXACT, **more: Any) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    return elsewhere(__file__, model, json.dumps(env), json.dumps(more))


def elsewhere(script: str, model: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints of a model, as a line of JSON."""
    with engines.variables({"VLLM_LOGGING_LEVEL": "ERROR"}):
        done = subprocess.run(
            [sys.executable, script, str(model), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"it failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    _model, _env, _more = sys.argv[1:]
    print(json.dumps(measure(Path(_model), json.loads(_env), **json.loads(_more))), flush=True)
