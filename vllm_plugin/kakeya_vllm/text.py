"""Text for calibration and evaluation: detokenising, splits that must not be mixed, passages.

WikiText-2 is distributed as words separated by spaces (``a two @-@ part episode , " Heads " ,
of``). The test split is evaluated as it is, because published figures are; the validation split
serves as calibration text and is turned back into ordinary prose first, which is what a served
model sees.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

# What the plugin calibrates on when nobody names a text: a part of the validation split, as prose
# (scripts/bundle_text.py makes it).
BUNDLED_TEXT = Path(__file__).with_name("data") / "calibration.txt"

# The evaluation text. Calibrating on it would make every quality figure worthless, so `kakeya
# calibrate` refuses it.
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
# Files whose part in an experiment is known.
SPLITS = {
    WIKITEXT2_TEST_SHA256: "test",
    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8": "validation",
    "d2e98831e9cdda50ed3b85fc33eab886eb4682bd5f2e05d6a8b4209c4355fea2": "validation",
}
# The same by the words alone (hash_of_words): line ends, blank lines, indentation and spaces may
# have changed on a file's way, and the words are still those of the test.
TEST_WORDS_SHA256 = {
    "06f8f4136de90fcf1b32ffda9136ecab621b3e437c370b5cdd27b37e9e9e9efc": "WikiText-2 test split",
    "706e3ea32137d21672193c7a4b418f1428a9fcbf63976e297d91cfd56d269b91": (
        "WikiText-2 test split, as prose"
    ),
}

# Marks only the space-separated form has: number and hyphen separators, and words cut by the
# vocabulary.
_TOKENISED_MARKS = (" @-@ ", " @,@ ", " @.@ ", "<unk>")

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" ?@([-,.])@ ?", r"\1"),
        (r"(?<==) (?==)", ""),  # headings: "= = Title = =" -> "== Title =="
        (r"(?<=\d) – (?=\d)", "–"),  # ranges of numbers
        (r"(?<=s) '(?= )", "'"),  # plural possessive: "Linnaeus ' concept"
        (r"(?<= )' (?=\w)", "'"),  # elision or opening quote: "' 70s"
        (r" ('(?:s|t|m|d|ve|re|ll))\b", r"\1"),
        (r" ([,.;:?!%°′″’”)\]]|\.\.\.+)(?=[\s,.;:?!%°′″’”)\]\"'—–-]|$)", r"\1"),
        (r"(?<=[(\[$£₤“‘]) ", ""),
        (r" / ", "/"),
    )
]
# Words that were cut from the vocabulary cannot be restored; they go, with the compounds, brackets
# and quotes that would hold nothing else.
_COMPOUND = r"(?:\S+ @[-,.]@ )*<unk>(?: @[-,.]@ \S+)*"
_CUT = re.compile(rf' ?(?:\( {_COMPOUND} \)|" {_COMPOUND} "|{_COMPOUND})')
_QUOTE = re.compile(r' ?" ?')


def _attach_quotes(line: str) -> str:
    """Straight double quotes of one line, taken in turns as opening and closing."""
    opening = False

    def place(_: re.Match) -> str:
        nonlocal opening
        opening = not opening
        return ' "' if opening else '" '

    return _QUOTE.sub(place, line)


def detokenise(text: str) -> str:
    """Prose from WikiText's space-separated words. Text without such marks comes back with its
    lines stripped only."""
    if not any(mark in text for mark in _TOKENISED_MARKS):
        return "\n".join(line.strip() for line in text.split("\n"))
    lines = []
    for line in text.split("\n"):
        line = _attach_quotes(_CUT.sub("", line.strip()))
        for pattern, replacement in _RULES:
            line = pattern.sub(replacement, line)
        lines.append(re.sub(r" {2,}", " ", line).strip())
    return "\n".join(lines)


def sha256_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def hash_of_words(text: str) -> str:
    """SHA-256 of the words of a text, one space between any two."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8")).hexdigest()


def refuse_test_text(text: str, path: str | Path) -> None:
    """Raise SystemExit if ``text``, read from ``path``, is one that quality is measured on."""
    found = TEST_WORDS_SHA256.get(hash_of_words(text))
    if found is not None or sha256_of(path) == WIKITEXT2_TEST_SHA256:
        raise SystemExit(
            f"kakeya: {path} is the {found or 'WikiText-2 test split'}, which is for evaluation "
            "only: figures measured on text that a codec was calibrated on say nothing"
        )


def read_text(path: str | Path) -> str:
    """The file as UTF-8. Errors name the path."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"kakeya: text file {path} does not exist") from None
    except UnicodeDecodeError as e:
        raise SystemExit(f"kakeya: text file {path} is not UTF-8: {e}") from None


def tokenise(model: str, text: str, **settings: Any) -> list[int]:
    """Token ids of the whole text, without special tokens. ``settings``: of the tokenizer."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # A whole corpus is longer than the model's window on purpose; passages are cut from it
    # afterwards.
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model, **settings)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def consecutive_passages(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """`count` passages of `length` tokens from the start of the text, one after the other."""
    have = len(tokens) // length
    if count < 1 or have < count:
        raise SystemExit(
            f"kakeya: the text holds {have} passages of {length} tokens; {count} were asked for"
        )
    return [tokens[p * length : (p + 1) * length] for p in range(count)]


def spread_passages(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """`count` disjoint passages of `length` tokens, spread evenly over the text so that many
    articles take part."""
    have = len(tokens) // length
    if count < 1 or have < count:
        raise SystemExit(
            f"kakeya: the text holds {have} passages of {length} tokens; {count} were asked for"
        )
    return [tokens[p : p + length] for p in ((i * have // count) * length for i in range(count))]


def held_out_passages(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """Passages of ``length`` tokens that :func:`spread_passages` leaves when it takes ``count``:
    one for every four of those, spread over the text, as many as there are."""
    have = len(tokens) // length
    taken = {i * have // count for i in range(count)}
    rest = [i for i in range(have) if i not in taken]
    wanted = min(len(rest), max(1, count // 4))
    chosen = [rest[(2 * i + 1) * len(rest) // (2 * wanted)] for i in range(wanted)]
    return [tokens[i * length : (i + 1) * length] for i in chosen]
