"""How models of many families turn their keys, as seen when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import families
import hybrid
import pytest
import torch
from kakeya_vllm import probe, rope
from kakeya_vllm.support import UnsupportedFeature

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "bfloat16"}
FULL, HALVES, NEIGHBOURS = 64, False, True
# Channels that compressed layers rotate, and whether neighbours are pairs; None: they rotate none.
TURNED = {
    "llama2": (FULL, HALVES),
    "qwen2_yarn": (FULL, HALVES),
    "glm4": (FULL, NEIGHBOURS),  # half of 128
    "cohere": (FULL, NEIGHBOURS),
    "gptj": (32, NEIGHBOURS),
    "gpt2": None,
    "opt": None,
    # Full layers beside windows: the last two hold a rotary module and do not apply it.
    "gemma3": (256, HALVES),
    "gemma2": (128, HALVES),
    "cohere2": None,
    "exaone4": None,
    # Through vLLM's Transformers backend.
    "gpt_neox": (16, HALVES),
    "phi2": (32, HALVES),
    "olmo3": (FULL, HALVES),
    "hunyuan": (FULL, HALVES),
}


def _found(worker: Any) -> Any:
    model, names = worker.get_model(), list(worker._kakeya.layers)
    own = [module.__dict__.get("forward") for module in model.modules()]
    found = rope.find(model, names, worker.vllm_config)
    assert [module.__dict__.get("forward") for module in model.modules()] == own
    return None if found is None else (found.rotary_dim, found.interleaved)


@pytest.mark.parametrize("name", TURNED)
def test_how_keys_are_turned(name: str, tmp_path: Path) -> None:
    """A family with a wrong expectation here would be turned back by other angles than its own; one
    that vLLM runs otherwise in another version is noticed."""
    model = families.make(tmp_path, families.FAMILIES[name].about)
    with engines.engine(model, **OPTIONS) as engine:
        assert engine.worker(_found) == TURNED[name]


def test_looking_changes_nothing(tiny: Path) -> None:
    prompts = [engines.tokens(1, 150), engines.tokens(2, 40)]
    with engines.engine(tiny, **OPTIONS) as engine:
        before, *others = engine.run(prompts, 4)
        assert engine.worker(_found) == (128, HALVES)
        after, *more = engine.run(prompts, 4)
        assert after.cached == 128  # what was sealed before is read
        assert [run.tokens for run in (after, *more)] == [run.tokens for run in (before, *others)]


def test_a_model_that_turns_its_keys_otherwise_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its rotary module says."""
    from vllm.model_executor.models.qwen2 import Qwen2Attention

    original = Qwen2Attention.forward

    def twice(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return original(self, positions * 2, hidden_states)

    monkeypatch.setattr(Qwen2Attention, "forward", twice)
    with (
        pytest.raises(UnsupportedFeature, match="keys are not turned by its angles alone"),
        engines.engine(tiny, max_model_len=1024, **OPTIONS),
    ):
        pass


@pytest.mark.cpu_only
def test_keys_that_vllm_turns_wrongly_are_noticed(tmp_path: Path) -> None:
    """LFM2 hands [tokens, heads, channels] to vLLM's rotary kernel for the CPU (0.32), which takes
    heads for tokens: keys are turned by positions of others."""
    model = hybrid.make(tmp_path / "lfm2", "lfm2")
    with (
        pytest.raises(UnsupportedFeature, match="keys are not turned by its angles alone"),
        engines.engine(model, skip_tokenizer_init=True, dtype="float32"),
    ):
        pass


def test_a_model_that_cannot_be_looked_at_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of the model")

    monkeypatch.setattr(probe, "_run", fail)
    words = r"keys cannot be looked at \(ZeroDivisionError: of the model\)"
    with pytest.raises(UnsupportedFeature, match=words), engines.engine(tiny, **OPTIONS):
        pass
