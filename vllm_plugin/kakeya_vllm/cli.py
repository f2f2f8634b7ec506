"""The command `kakeya`: look at a machine, a model, a recipe; calibrate and judge."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kakeya_vllm import __version__
from kakeya_vllm.engine import CHUNK, prepare_environment
from kakeya_vllm.evaluation.protocol import MODES, STREAMS

CALIBRATION_TOKENS = 8 * CHUNK
BLOCK = 128


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def calibration_tokens(text: str) -> int:
    value = positive(text)
    if value < CHUNK:
        raise argparse.ArgumentTypeError(
            f"{text}: at least one passage of {CHUNK} tokens is needed"
        )
    return value


def passages(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def numbers(text: str) -> list[int]:
    """Numbers from 0 with commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers such as 0,1,2") from None
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text}: numbers begin at 0")
    return found


def shares(text: str) -> list[float]:
    """Numbers from 0 to 1 with commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text} is not a list of shares such as 0.1,0.5,0.9")
    return found


def options(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object such as {{"dtype": "float16"}}')
    return found


def coded_tokens(text: str) -> int:
    value = positive(text)
    if value > CHUNK or value % BLOCK:
        raise argparse.ArgumentTypeError(
            f"{text}: valid are multiples of {BLOCK} up to {CHUNK}, whole blocks of the prefix"
        )
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kakeya", description="KAKEYA: a compressed KV cache for vLLM"
    )
    parser.add_argument("--version", action="version", version=f"kakeya {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    c = commands.add_parser(
        "calibrate", help="measure a model's keys, values and queries on a text"
    )
    c.add_argument("model", help="directory or name of the model, as vLLM takes it")
    c.add_argument(
        "--text",
        help="UTF-8 text to run through the model (default: the text in the package, prose of an "
        "encyclopedia)",
    )
    c.add_argument(
        "--weights-only",
        action="store_true",
        help="run random tokens instead of a text, which then only shows the error",
    )
    c.add_argument(
        "--tokens",
        type=calibration_tokens,
        default=CALIBRATION_TOKENS,
        help=f"how much of the text, rounded down to passages of {CHUNK} (default %(default)s)",
    )
    c.add_argument(
        "--out", help="artefact to write (default: where the plugin looks for this model's)"
    )
    reported = c.add_mutually_exclusive_group()
    reported.add_argument(
        "--ratio",
        type=float,
        default=4.6,
        help="capacity ratio at which the error on held-out text and the allocation of bits are "
        "printed; the artefact serves every ratio (default %(default)s)",
    )
    reported.add_argument("--recipe", help="the same for a recipe: a preset or a file")
    reported.add_argument(
        "--for",
        dest="seed_recipe",
        help="calibrate a recipe of the seed instead, such as v1.3-ppl (docs/seed.md)",
    )

    e = commands.add_parser("eval", help="compare caches with the uncompressed one on a text")
    e.add_argument(
        "--model", required=True, help="directory or name of the model, as vLLM takes it"
    )
    e.add_argument("--text", help="UTF-8 text to evaluate on; for --task needle, to hide it in")
    e.add_argument(
        "--caches",
        type=lambda text: text.split(","),
        help="recipes (presets or files), vLLM's own formats (fp8, int4_per_token_head, "
        "turboquant_...) and the seed's (docs/seed.md: v1.3-ppl, d4-10, ...), with commas "
        "(default: what KAKEYA_RECIPE or the plugin chooses)",
    )
    e.add_argument(
        "--passages",
        type=passages,
        help="how many passages; auto: as many as decide (default %(default)s)",
    )
    e.add_argument(
        "--mode",
        choices=MODES,
        default="snapshot",
        help="what is compressed when; docs/quality.md defines them (default %(default)s)",
    )
    e.add_argument("--streams", choices=STREAMS, default="kv", help="keys, values or both")
    e.add_argument(
        "--layers", type=lambda text: tuple(numbers(text)), help="compress only these layers"
    )
    e.add_argument(
        "--boundary",
        type=numbers,
        default=[0],
        help="layers at either end that stay uncompressed; several numbers: one run each",
    )
    e.add_argument(
        "--coded-tokens",
        type=coded_tokens,
        default=CHUNK,
        help="of the prefix, in mode prefix-only (default %(default)s)",
    )
    e.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model in both engines; float32 shows the codec without bf16 noise",
    )
    e.add_argument(
        "--max-tokens",
        type=positive,
        default=256,
        help="of an answer, in mode generate (default %(default)s)",
    )
    e.add_argument(
        "--task",
        choices=("gsm8k", "needle"),
        help="questions with answers instead of perplexity",
    )
    e.add_argument("--data", help='of --task gsm8k: JSON lines of "question" and "answer"')
    e.add_argument("--limit", type=positive, help="questions of --task gsm8k (default: all)")
    e.add_argument(
        "--lengths",
        type=numbers,
        default=[2048],
        help="tokens of the prompts of --task needle, with commas (default 2048)",
    )
    e.add_argument(
        "--depths",
        type=shares,
        default=[0.1, 0.5, 0.9],
        help="where in them the needle is, 0 to 1, with commas (default 0.1,0.5,0.9)",
    )
    e.add_argument("--json", help="also write the figures to this file")
    e.add_argument("--html", help="also write a report with plots to this file")

    d = commands.add_parser("doctor", help="say whether KAKEYA runs here, and with a model")
    d.add_argument("model", nargs="?", help="directory or name of a model, as vLLM takes it")
    d.add_argument("--max-model-len", type=positive, help="as of vllm serve")
    d.add_argument("--max-num-seqs", type=positive, help="as of vllm serve")
    d.add_argument("--tensor-parallel-size", type=positive, help="as of vllm serve")
    d.add_argument("--trust-remote-code", action="store_true", help="as of vllm serve")
    d.add_argument("--json", help="also write the findings to this file")

    b = commands.add_parser("bench", help="measure caches side by side on this machine and model")
    b.add_argument("model", help="directory or name of the model, as vLLM takes it")
    b.add_argument(
        "--caches",
        type=lambda text: text.split(","),
        help="bf16, vLLM's own formats (fp8, int4_per_token_head), recipes, or kakeya for what the "
        "plugin chooses, with commas; ratios are against the first (default bf16, on a GPU fp8, "
        "kakeya)",
    )
    b.add_argument(
        "--cells",
        help="batch x context, with commas (default 1x8192,16x8192,64x8192 on a GPU, 1x512,4x512 "
        "without)",
    )
    b.add_argument(
        "--steps", type=positive, default=32, help="steps of decoding (default %(default)s)"
    )
    b.add_argument(
        "--repeats", type=positive, default=3, help="prompts a first token (default %(default)s)"
    )
    b.add_argument("--dummy", action="store_true", help="random weights: only shapes are needed")
    b.add_argument(
        "--options", type=options, default={}, help="more arguments of vllm.LLM, as a JSON object"
    )
    b.add_argument(
        "--timeout", type=positive, default=1800, help="seconds an engine may take (%(default)s)"
    )
    b.add_argument("--json", help="also write the measurements to this file")
    b.add_argument("--html", help="also write a report with plots to this file")

    i = commands.add_parser("inspect", help="draw a recipe's page, or what an artefact decides")
    i.add_argument("what", help="recipe (preset or file), or path of a calibration artefact")
    i.add_argument("--recipe", help="with an artefact: whose bits (default: the default recipe)")
    i.add_argument(
        "--head-dim",
        type=int,
        choices=(64, 96, 128, 256),
        default=128,
        help="with a recipe: of the page that is drawn (default %(default)s)",
    )
    i.add_argument("--json", help="also write it to this file")
    i.add_argument("--html", help="with an artefact: bits by layer and head as a picture")
    return parser


def calibrate_command(args: argparse.Namespace) -> Path:
    """`kakeya calibrate`: the artefact that was written."""
    if args.seed_recipe:
        if args.weights_only:
            raise SystemExit("kakeya: --weights-only is for KAKEYA's own recipes, not with --for")
        from kakeya_vllm.seed.calibration import calibrate_for

        return calibrate_for(args.model, args.text, args.tokens, args.seed_recipe, args.out)
    from kakeya_vllm.calibrate import calibrate

    return calibrate(
        args.model,
        args.text,
        args.tokens,
        args.out,
        weights_only=args.weights_only,
        recipe=_recipe(args.recipe, args.ratio),
    )


def _recipe(name: str | None, ratio: float) -> str:
    """The calibrated recipe that a command line asks for; SystemExit with what is valid."""
    from kakeya_vllm import config, heldout, lib

    try:
        if name is None:
            return heldout.recipe_of_ratio(ratio)
        recipe = config.read_recipe(name, "--recipe")
        lib.load().recipe_describe(recipe)
    except (lib.KakeyaError, config.ConfigError) as error:
        raise SystemExit(f"kakeya: {getattr(error, 'text', error)}") from None
    return recipe


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command not in ("doctor", "inspect"):  # these look at what is there
        prepare_environment()
    if args.command == "calibrate":
        print(f"kakeya: wrote {calibrate_command(args)}")
    elif args.command == "doctor":
        from kakeya_vllm.doctor import doctor_command

        return doctor_command(args)
    elif args.command == "bench":
        from kakeya_vllm.bench import bench_command

        return bench_command(args)
    elif args.command == "inspect":
        from kakeya_vllm.inspection import inspect_command

        inspect_command(args)
    else:
        from kakeya_vllm.evaluation.command import evaluate_command

        evaluate_command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
