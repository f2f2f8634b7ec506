"""The command `kakeya`: calibrate a model, judge a recipe."""

from __future__ import annotations

import argparse
import sys

from kakeya_vllm import __version__
from kakeya_vllm.engine import CHUNK, prepare_environment

CALIBRATION_TOKENS = 8 * CHUNK
PASSAGES = 16


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
    c.add_argument("--text", required=True, help="UTF-8 text to run through the model")
    c.add_argument(
        "--tokens",
        type=calibration_tokens,
        default=CALIBRATION_TOKENS,
        help=f"how much of the text, rounded down to passages of {CHUNK} (default %(default)s)",
    )
    c.add_argument(
        "--out", help="artefact to write (default: where the plugin looks for this model's)"
    )

    e = commands.add_parser("eval", help="compare a recipe with the uncompressed cache on a text")
    e.add_argument(
        "--model", required=True, help="directory or name of the model, as vLLM takes it"
    )
    e.add_argument("--text", required=True, help="UTF-8 text to evaluate on")
    e.add_argument(
        "--recipe",
        help="preset name or recipe file (default: what KAKEYA_RECIPE or the plugin chooses)",
    )
    e.add_argument(
        "--passages",
        type=positive,
        default=PASSAGES,
        help="how many passages (default %(default)s)",
    )
    e.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model in both engines; float32 shows the codec without bf16 noise",
    )
    e.add_argument("--json", help="also write the figures to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    prepare_environment()
    if args.command == "calibrate":
        from kakeya_vllm.calibrate import calibrate

        print(f"kakeya: wrote {calibrate(args.model, args.text, args.tokens, args.out)}")
    else:
        from kakeya_vllm.evaluate import evaluate_command

        evaluate_command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
