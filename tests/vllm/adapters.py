"""LoRA adapters for the tiny model, in the files that peft writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
# Of B: the adapter changes what the model says, and attention stays as soft as the model's own.
SCALE = 0.1


def make_adapter(model: Path, directory: Path, seed: int) -> Path:
    """A random adapter for all of a model's attention projections, large enough that it changes
    what the model says: K and V of the cache depend on it."""
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(seed)
    state = {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        names = [n for n in weights.keys() if "self_attn" in n and n.endswith("weight")]  # noqa: SIM118
        for name in names:
            rows, columns = weights.get_slice(name).get_shape()
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a = torch.randn(RANK, columns, generator=generator) / columns**0.5
            state[f"{module}.lora_A.weight"] = a
            b = torch.randn(rows, RANK, generator=generator)
            state[f"{module}.lora_B.weight"] = b * SCALE
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(about))
    save_file(state, directory / "adapter_model.safetensors")
    return directory
