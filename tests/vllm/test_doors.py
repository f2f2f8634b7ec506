"""vLLM's own doors: its options, its features and its tools work with KAKEYA as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import Engine, assert_same_run, engine, tokens
from kakeya_vllm import register
from kakeya_vllm.config import ConfigError

DTYPE = engines.exact_dtype()
SEALED = engines.INVARIANT if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
# Log-probabilities that should agree except for the order of sums, of float32 and of bfloat16. (In
# batch-invariant mode they are the same, if the process never ran an engine in another.)
EXACT = 0.25 if engines.on_gpu() else 1e-3


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
    prefill = "raw" if engines.on_gpu() else "sealed"
    with engines.variables({"KAKEYA_RECIPE": "kakeya-free-4.0x", "KAKEYA_PREFILL": prefill}):
        config = configure(tiny, "--attention-backend", "KAKEYA", *argv)
    resolved = config.additional_config["kakeya"]
    assert resolved["recipe"] == "kakeya-free-5.3x"  # the option wins over the variable
    assert resolved["prefill"] == prefill  # which holds for what the option leaves open


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
    "dtype": DTYPE,
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
        runs = structured(kept)
    if not engines.on_gpu():
        assert runs == expected
    for a, b in zip(runs, expected, strict=True):
        assert a.text == b.text
        assert_same_run(a, b, EXACT)


def test_a_multimodal_prompt_of_a_text_model_is_refused_and_the_engine_goes_on(
    talking: Path,
) -> None:
    import numpy as np

    image = {"image": np.zeros((8, 8, 3), dtype=np.uint8)}
    cache = {"attention_backend": None, "kv_cache_dtype": "kakeya-free-5.3x"}
    with engine(talking, dtype=DTYPE, **cache) as made:
        assert made.runtime.settings.recipe == "kakeya-free-5.3x"
        before = made.run([tokens(1, 200)], 4)
        with pytest.raises(ValueError, match=r"(?i)multi-modal .* text-only"):
            made.llm.generate({"prompt": "What is this?", "multi_modal_data": image})
        made.reset_prefix_cache()
        assert made.run([tokens(1, 200)], 4) == before


def make_eagle_head(directory: Path) -> Path:
    """A random EAGLE drafter for the tiny model: one layer behind a projection."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, heads, kv_heads, head_dim = 512, 768, 4, 2, 128
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (heads * head_dim, hidden),
        "layers.0.self_attn.k_proj": (kv_heads * head_dim, hidden),
        "layers.0.self_attn.v_proj": (kv_heads * head_dim, hidden),
        "layers.0.self_attn.o_proj": (hidden, heads * head_dim),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
    }
    state = {
        f"{name}.weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    state["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "vocab_size": 512,
        "torch_dtype": "float32",
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(state, directory / "model.safetensors")
    return directory


def banner_lines(worker: Any) -> list[str]:
    from kakeya_vllm import banner

    return banner.compose(worker._kakeya, worker.model_runner.kv_cache_config)


@pytest.fixture(scope="module")
def without_drafts(tiny: Path) -> list[engines.Run]:
    with engine(tiny, SEALED, **DRAFTING) as made:
        return made.run(DRAFTED, 30)


DRAFTING = {"skip_tokenizer_init": True, "dtype": DTYPE}
DRAFTED = [tokens(1, 300), tokens(2, 120)]  # the second fills its first block while decoding


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_drafts_of_a_model_change_nothing(
    tiny: Path, tmp_path: Path, without_drafts: list[engines.Run], method: str
) -> None:
    """Layers of the drafter keep the stock cache, in blocks that share ids with compressed ones.

    The draft model is the model itself, which reads its own cache: it is right often, not always.
    A random EAGLE head is always wrong.
    """
    drafter = tiny if method == "draft_model" else make_eagle_head(tmp_path / "eagle")
    speculative = {"method": method, "model": str(drafter), "num_speculative_tokens": 3}
    with engine(tiny, SEALED, speculative_config=speculative, **DRAFTING) as made:
        assert len(made.runtime.layers) == 4
        runs = made.run(DRAFTED, 30)
        again = made.run(DRAFTED, 30)
        names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
        drafted, accepted = map(made.counter, names)
        (line,) = [line for line in made.worker(banner_lines) if line.startswith("  layers")]
    own = {"draft_model": 4, "eagle": 1}[method]
    assert line.endswith(
        f"4 compressed: 0-3; 0 stock {DTYPE}: none; {own} of the draft model, stock"
    )
    assert accepted < drafted
    assert (accepted > 0) == (method == "draft_model")
    assert [run.cached for run in again] != [0, 0]
    for a, b, c in zip(without_drafts, runs, again, strict=True):
        assert_same_run(a, b, EXACT)
        if not engines.on_gpu():  # there a prompt that hits its blocks reads what they lost
            assert_same_run(a, c, EXACT)


# Tools ---------------------------------------------------------------------------------------


def scores(made: Engine, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether it is the greedy one: with the calls that
    lm_eval makes of LLM."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    prompts = [{"prompt_token_ids": context + rest} for context, rest in pairs]
    outputs = made.llm.generate(prompts, [params] * len(pairs), use_tqdm=False)
    found = []
    for (context, rest), output in zip(pairs, outputs, strict=True):
        entries = output.prompt_logprobs[len(context) :]
        likely = [entry[token].logprob for token, entry in zip(rest, entries, strict=True)]
        best = [max(entry, key=lambda token: entry[token].logprob) for entry in entries]
        found.append((sum(likely), best == rest))
    return found


def test_what_lm_eval_calls(talking: Path) -> None:
    """Prompts of one step are computed from raw keys and values: scores are the stock ones."""
    from vllm import SamplingParams

    question = tokens(3, 300)
    values = []
    for backend in (None, "KAKEYA"):
        with engine(talking, dtype=DTYPE, attention_backend=backend) as made:
            (greedy,) = made.run([question], 5)
            pairs = [(question, tokens(i, 5)) for i in range(3)] + [(question, greedy.tokens)]
            values.append(scores(made, pairs))
            letters = {"allowed_token_ids": list(range(3, 259))}  # those that are text
            (free,) = made.run(["Tell me. " * 20], 30, **letters)
            end = free.text[len(free.text) // 2]
            until = SamplingParams(temperature=0, max_tokens=30, stop=[end], **letters)
            (output,) = made.llm.generate(["Tell me. " * 20], until, use_tqdm=False)
            assert output.outputs[0].text == free.text.split(end)[0]
    stock, compressed = values
    assert [is_greedy for _, is_greedy in stock[:3]] == [False] * 3
    assert stock[3][1]
    for a, b in zip(stock[:3], compressed[:3], strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.25 if engines.on_gpu() else 3e-3)
        assert a[1] == b[1]


BENCHES = """
import sys
from vllm.entrypoints.cli.main import main

for command in {commands!r}:
    sys.argv = ["vllm", "bench", *command]
    main()
"""


def test_vllm_bench_latency_and_throughput(smollm2: Path, tmp_path: Path) -> None:
    """One after the other in a process: most of their time is start-up."""
    options = ["--model", str(smollm2), "--attention-backend", "KAKEYA", "--dtype", DTYPE]
    options += ["--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(engines.KV_BYTES)]
    options += engines.memory_arguments()
    latency, throughput = tmp_path / "latency.json", tmp_path / "throughput.json"
    lengths = ["--input-len", "130", "--output-len", "4"]
    one = ["latency", *options, *lengths, "--batch-size", "2", "--output-json", str(latency)]
    one += ["--num-iters-warmup", "1", "--num-iters", "2"]
    lengths = ["--random-input-len", "130", "--random-output-len", "4"]
    two = ["throughput", *options, *lengths, "--dataset-name", "random", "--num-prompts", "3"]
    two += ["--output-json", str(throughput)]
    script = BENCHES.format(commands=[one, two])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(json.loads(latency.read_text())["latencies"]) == 2
    assert json.loads(throughput.read_text())["num_requests"] == 3
