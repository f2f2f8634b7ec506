"""The demonstration behind `make demo`: a real model answers through compressed pages.

1. calibrates the model if its artefact is missing (`kakeya calibrate`);
2. answers two prompts, printed token by token, with VLLM_ATTENTION_BACKEND=KAKEYA;
3. evaluates against the uncompressed cache (`kakeya eval`) and prints capacity, quality, seconds;
4. writes the same figures to a JSON file.

Every engine runs in a process of its own. Greedy sampling, so two runs print the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kakeya_vllm import cli, engine
from kakeya_vllm.evaluation.command import evaluate, report, write_json

# The second one fills two blocks of 128 tokens, so its answer is drawn from compressed pages.
PROMPTS = (
    "What is the water cycle?",
    """\
Tides are the rise and fall of sea levels caused by the combined effects of the gravitational \
forces exerted by the Moon and the Sun, and by the rotation of the Earth. They were described by \
sailors and fishermen long before they were explained. Most places see two high waters and two \
low waters each day, and the interval between two high waters is a little more than twelve hours, \
because the Moon moves on in its orbit while the Earth turns beneath it.

When the Sun, the Moon and the Earth stand in a line, at new moon and at full moon, their pulls \
add up and the range of the tide is at its largest; this is called a spring tide. When the Moon \
is at its first or third quarter, the pulls partly cancel and the range is small; this is called \
a neap tide. The shape of the coast matters as much as the sky does. In a funnel-shaped bay the \
rising water is squeezed into an ever narrower space and can reach a height of fifteen metres, \
while the shore of an island in the middle of the ocean may see less than one.

People have used the tides for centuries. Mills stood at the mouths of rivers and turned their \
wheels with water that had been held back at high tide. Harbours open their gates by the clock \
of the Moon.

Summarise this text in three sentences.""",
)
NEW_TOKENS = 160
# Of the demonstration: a minute on two cores. `kakeya eval` takes as many as decide.
PASSAGES = 16


def stream(model: str) -> dict[str, Any]:
    """Continue PROMPTS, printing tokens as they come. Returns texts and seconds."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from kakeya_vllm import banner

    llm = engine.in_process_engine(model, "environment")
    for lines in llm.collective_rpc(
        lambda worker: banner.compose(worker._kakeya, worker.model_runner.kv_cache_config)
    ):
        print("\n".join(lines), flush=True)
    tokenizer = llm.get_tokenizer()
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=NEW_TOKENS,
        output_kind=RequestOutputKind.DELTA,
    )
    results = []
    for number, prompt in enumerate(PROMPTS, 1):
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt_tokens = len(tokenizer(text)["input_ids"])
        print(f"\n--- prompt {number}, {prompt_tokens} tokens\n{prompt}\n--- answer", flush=True)
        started, pieces = time.monotonic(), []
        llm.llm_engine.add_request(str(number), text, parameters)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                pieces.append(output.outputs[0].text)
                print(pieces[-1], end="", flush=True)
        seconds = time.monotonic() - started
        print(f"\n--- {seconds:.1f} s", flush=True)
        results.append(
            {
                "prompt": prompt,
                "prompt_tokens": prompt_tokens,
                "answer": "".join(pieces),
                "seconds": seconds,
            }
        )
    return {"texts": results, "new_tokens": NEW_TOKENS}


def run_child(arguments: list[str], environment: dict[str, str] | None = None) -> float:
    """A Python process of ours with its output passed through; returns seconds."""
    started = time.monotonic()
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"demo: `{' '.join(command)}` failed (exit {done.returncode})")
    return time.monotonic() - started


def calibration_artefact(model: str) -> Path:
    """Where the plugin looks for this model's artefact."""
    from transformers import AutoConfig

    from kakeya_vllm.config import default_calibration_path, model_fingerprint

    config = AutoConfig.from_pretrained(model)
    return default_calibration_path(model_fingerprint(config.get_text_config()))


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def demo(model: str, data: Path, passages: int, out: Path) -> None:
    started, seconds = time.monotonic(), {}
    artefact = calibration_artefact(model)
    calibrate = ["calibrate", model, "--text", str(data / "wikitext2-valid-tokenised.txt")]
    test_text = str(data / "wikitext2-test.txt")
    if artefact.is_file():
        heading(f"calibration: {artefact.name} is there")
    else:
        heading("calibration: measuring the model once (validation text)")
        seconds["calibrate"] = run_child(["kakeya_vllm.cli", *calibrate])

    heading("text through compressed pages (VLLM_ATTENTION_BACKEND=KAKEYA)")
    partial = out.with_name(f".{out.name}.stream")
    seconds["generate"] = run_child(
        ["kakeya_vllm.demo", "--stream-to", str(partial), "--model", model],
        {"VLLM_ATTENTION_BACKEND": "KAKEYA"},
    )
    generation = json.loads(partial.read_text())
    partial.unlink()

    heading(f"quality and capacity: {passages} passages of WikiText-2 (test), bf16 then KAKEYA")
    before = time.monotonic()
    result = evaluate(model, test_text, passages)
    seconds["evaluate"] = time.monotonic() - before
    seconds["total"] = time.monotonic() - started
    result = {
        **result,
        "generation": generation,
        "seconds": seconds,
        "commands": {
            "all": "make demo",
            "calibrate": " ".join(["kakeya", *calibrate]),
            "evaluate": f"kakeya eval --model {model} --text {test_text} --passages {passages}",
        },
    }
    write_json(out, result)
    heading("result")
    print(report(result))
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"\nseconds: {parts}\nwritten to {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what `make demo` runs")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", type=Path, help="directory of the WikiText-2 files")
    parser.add_argument("--out", type=Path, default=Path("demo.json"))
    parser.add_argument("--passages", type=cli.positive, default=PASSAGES)
    # Of the process that owns the engine of step 2.
    parser.add_argument("--stream-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    engine.prepare_environment()
    if args.stream_to:
        write_json(args.stream_to, stream(args.model))
    elif args.data is None:
        parser.error("--data is needed")
    else:
        demo(args.model, args.data, args.passages, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
