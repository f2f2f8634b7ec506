"""The command line: what it accepts, and what it refuses with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
from kakeya_vllm import cli

DATA = Path(__file__).resolve().parents[2] / "data"


def test_defaults():
    args = cli.build_parser().parse_args(["calibrate", "MODEL"])
    assert (args.text, args.tokens, args.out) == (None, 16384, None)
    assert (args.ratio, args.recipe, args.weights_only) == (4.6, None, False)
    args = cli.build_parser().parse_args(["eval", "--model", "M", "--text", "t.txt"])
    assert (args.passages, args.caches, args.json, args.mode) == (None, None, None, "snapshot")
    args = cli.build_parser().parse_args(
        ["eval", "--model", "M", "--text", "t", "--caches", "fp8,kakeya-4.6x", "--boundary", "0,2"]
    )
    assert (args.caches, args.boundary) == (["fp8", "kakeya-4.6x"], [0, 2])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: command"),
        (["calibrate"], "model"),
        (["calibrate", "M", "--ratio", "4", "--recipe", "kakeya-4.6x"], "not allowed with"),
        (["calibrate", "M", "--text", "t", "--tokens", "100"], "one passage of 2048"),
        (["calibrate", "M", "--text", "t", "--tokens", "many"], "invalid"),
        (["eval", "--model", "M", "--text", "t", "--passages", "0"], "not a positive"),
        (["eval", "--model", "M", "--text", "t", "--mode", "warm"], "invalid choice"),
        (["eval", "--model", "M", "--task", "needle", "--depths", "2"], "not a list of shares"),
        (["eval", "--model", "M", "--text", "t", "--boundary=-1"], "begin at 0"),
        (["eval", "--model", "M", "--text", "t", "--coded-tokens", "100"], "multiples of 128"),
    ],
)
def test_bad_arguments_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ratio", "40"], "ratio is 40; valid"),
        (["--recipe", "kakeya-9.7x"], "no recipe is named 'kakeya-9.7x'"),
        (["--recipe", "no/such.json"], "cannot read the recipe file"),
        (["--text", "no/such.txt"], "does not exist"),
    ],
)
def test_what_calibrate_cannot_take_is_named(argv, words):
    with pytest.raises(SystemExit, match=words):
        cli.main(["calibrate", "MODEL", *argv])


def test_calibrating_on_the_test_split_is_refused():
    with pytest.raises(SystemExit, match="for evaluation only"):
        cli.main(["calibrate", "MODEL", "--text", str(DATA / "wikitext2-test.txt")])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--task", "gsm8k"], "--data"),
        ([], "--text is needed"),
        (["--text", "t", "--mode", "generate", "--html", "h.html"], "perplexity modes"),
        (["--text", "t", "--json", "no/such/place.json"], "does not exist"),
    ],
)
def test_what_eval_lacks_is_named(argv, words):
    model = Path(__file__).resolve().parents[2] / ".cache" / "models" / "smollm2"
    with pytest.raises(SystemExit, match=words):
        cli.main(["eval", "--model", str(model), *argv])


def test_installed_command_prints_its_version():
    command = Path(sys.executable).with_name("kakeya")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kakeya 0.")
