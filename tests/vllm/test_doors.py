"""vLLM's own doors: its options, its features and its tools work with KAKEYA as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import Engine, engine, tokens
from kakeya_vllm import register
from kakeya_vllm.config import ConfigError

pytestmark = pytest.mark.cpu_only

SEALED = {"KAKEYA_PREFILL": "sealed"}
EXACT = 1e-3  # log-probabilities that should agree except for the order of float32 sums


# Options -------------------------------------------------------------------------------------


def configure(tiny: Path, *argv: str, **options: Any) -> Any:
    """The VllmConfig of a command line, or of the arguments of LLM()."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = EngineArgs.from_cli_args(
        parser.parse_args(["--model", str(tiny), "--enforce-eager", "--skip-tokenizer-init", *argv])
    )
    for name, value in options.items():
        setattr(arguments, name, value)
    return arguments.create_engine_config()


@pytest.mark.parametrize(
    "argv",
    [
        ["--additional-config", '{"kakeya": {"recipe": "kakeya-free-5.3x"}}'],
        ["--additional-config.kakeya.recipe", "kakeya-free-5.3x"],
    ],
)
def test_additional_config_on_the_command_line(tiny: Path, argv: list[str]) -> None:
    with engines.variables({"KAKEYA_RECIPE": "kakeya-free-4.0x", "KAKEYA_PREFILL": "sealed"}):
        config = configure(tiny, "--attention-backend", "KAKEYA", *argv)
    resolved = config.additional_config["kakeya"]
    assert resolved["recipe"] == "kakeya-free-5.3x"  # the option wins over the variable
    assert resolved["prefill"] == "sealed"  # which holds for what the option leaves open


def test_an_unknown_key_is_refused_by_name(tiny: Path) -> None:
    argv = ["--additional-config.kakeya.recipy", "kakeya-free-5.3x"]
    with pytest.raises(ConfigError, match="unknown fields recipy; valid: recipe, calibration"):
        configure(tiny, "--attention-backend", "KAKEYA", *argv)


def test_kv_cache_dtype_selects_backend_and_recipe(tiny: Path) -> None:
    config = configure(tiny, kv_cache_dtype="kakeya-free-5.3x")
    assert register.is_selected(config)
    assert config.additional_config["kakeya"]["recipe"] == "kakeya-free-5.3x"
    assert config.cache_config.cache_dtype == "auto"
    plain = configure(tiny, "--attention-backend", "KAKEYA", kv_cache_dtype="kakeya")
    assert register.is_selected(plain)
    assert plain.additional_config["kakeya"]["recipe"] == "kakeya-free-4.6x"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("kakeya-99x", {}, "kakeya-free-4.6x-trellis"),
        ("kakeya-free-4.6x", {"attention_backend": "CPU_ATTN"}, "attention_backend is CPU_ATTN"),
        (
            "kakeya-free-4.6x",
            {"additional_config": {"kakeya": {"recipe": "kakeya-free-5.3x"}}},
            "['recipe'] is 'kakeya-free-5.3x'; valid: one of the two",
        ),
        ("kakeya-free-4.6x", {"additional_config": {"kakeya": 1}}, "needs an object"),
    ],
)
def test_kv_cache_dtypes_that_are_refused(tiny: Path, name: str, options: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        configure(tiny, kv_cache_dtype=name, **options)
    assert reason in str(error.value)
    assert f"kv_cache_dtype {name}" in str(error.value)


def test_vllm_that_has_a_closed_list_of_kv_cache_dtypes_refuses_the_option(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm.config import cache

    argv = ["--kv-cache-dtype", "kakeya-free-5.3x"]
    if hasattr(cache, "register_kv_cache_dtype"):  # from 0.33 on
        assert register.is_selected(configure(tiny, *argv))
        return
    with pytest.raises(SystemExit):
        configure(tiny, *argv)
    assert "invalid choice: 'kakeya-free-5.3x' (choose from 'auto'" in capsys.readouterr().err


# Features ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer."""
    return engines.add_byte_tokenizer(engines.make_tiny_model(tmp_path_factory.mktemp("talking")))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "even": {"type": "boolean"}},
    "required": ["name", "even"],
    "additionalProperties": False,
}
STRUCTURED = {
    "dtype": "float32",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def structured(made: Engine) -> list[engines.Run]:
    """Answers to one prompt of 300 tokens: as JSON, by a regular expression, one of three."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    kinds = [{"json": SCHEMA}, {"regex": "[A-F]{3}-[0-9]{4}"}, {"choice": ["red", "green", "blue"]}]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=80,
            logprobs=1,
            structured_outputs=StructuredOutputsParams(**kind),
        )
        for kind in kinds
    ]
    # One by one: a request waits for its grammar, and together they would meet in other steps.
    outputs = [made.llm.generate("A person: " * 30, one, use_tqdm=False)[0] for one in params]
    return [engines.to_run(output) for output in outputs]


def test_structured_output(talking: Path) -> None:
    with engine(talking, **STRUCTURED) as made:
        as_json, by_regex, choice = structured(made)
    answer = json.loads(as_json.text)
    assert set(answer) == {"name", "even"}
    assert isinstance(answer["even"], bool)
    letters, _, digits = by_regex.text.partition("-")
    assert set(letters) <= set("ABCDEF")
    assert (len(letters), len(digits), digits.isdigit()) == (3, 4, True)
    assert choice.text in ("red", "green", "blue")
    with engine(talking, attention_backend=None, block_size=128, **STRUCTURED) as stock:
        expected = structured(stock)
    with engine(talking, {"KAKEYA_BOUNDARY_SKIP_LAYERS": "0,1,2,3"}, **STRUCTURED) as kept:
        assert structured(kept) == expected


def test_a_multimodal_prompt_of_a_text_model_is_refused_and_the_engine_goes_on(
    talking: Path,
) -> None:
    import numpy as np

    image = {"image": np.zeros((8, 8, 3), dtype=np.uint8)}
    with engine(talking, dtype="float32") as made:
        before = made.run([tokens(1, 200)], 4)
        with pytest.raises(ValueError, match="(?i)multi-modal .* text-only"):
            made.llm.generate({"prompt": "What is this?", "multi_modal_data": image})
        made.reset_prefix_cache()
        assert made.run([tokens(1, 200)], 4) == before
