"""Detokenising and cutting text."""

from pathlib import Path

import pytest
from kakeya_vllm import text

DATA = Path(__file__).resolve().parents[2] / "data"

MARK = "a @-@ b "  # makes a line recognisable as space-separated words; detokenised: "a-b"


@pytest.mark.parametrize(
    ("words", "prose"),
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 234 @.@ 5 men", "1,234.5 men"),
        ("the Bill , in 2000 .", "the Bill, in 2000."),
        ("Teddy 's Story ; he didn 't", "Teddy's Story; he didn't"),
        ('a role as " Craig " in " Heads " .', 'a role as "Craig" in "Heads".'),
        ("= = Early life = =", "== Early life =="),
        ("60 centimetres ( 24 in ) long", "60 centimetres (24 in) long"),
        ("5 – 6 kilograms ( 11 – 13 lb ) ,", "5–6 kilograms (11–13 lb),"),
        ("lobsters – all of them – are blue", "lobsters – all of them – are blue"),
        ("since Linnaeus ' concept", "since Linnaeus' concept"),
        ("the U.S. 's law", "the U.S.'s law"),
        ("in the 1960s and ' 70s", "in the 1960s and '70s"),
        ("a species of <unk> lobster", "a species of lobster"),
        ("called <unk> ( <unk> ) .", "called."),
        ('called " <unk> " , and', "called, and"),
        ("in <unk> @,@ <unk> , <unk> @-@ foot wide", "in, wide"),
        ("and / or 50 % at 20 ° C", "and/or 50% at 20° C"),
        ("he asked : why ? and left !", "he asked: why? and left!"),
        ("it costs $ 5", "it costs $5"),
    ],
)
def test_words_become_prose(words, prose):
    assert text.detokenise(f" {MARK}{words} ") == f"a-b {prose}"


def test_quotes_do_not_run_over_lines():
    assert text.detokenise('a @-@ " b\n" c " d') == 'a-"b\n"c" d'


def test_prose_is_left_alone():
    prose = 'Well , "this" is - as it stands - prose ( sic ).\nSecond line.'
    assert text.detokenise(prose) == prose


def test_detokenising_prose_changes_nothing():
    once = text.detokenise((DATA / "wikitext2-valid-tokenised.txt").read_text(encoding="utf-8"))
    assert text.detokenise(once) == once


def test_validation_text_has_no_marks_left():
    prose = text.detokenise((DATA / "wikitext2-valid-tokenised.txt").read_text(encoding="utf-8"))
    for mark in ("<unk>", " @", "@ ", " , ", " . ", " 's ", "( ", " )", "  "):
        assert mark not in prose, mark
    assert "(24 in)" in prose
    assert prose.count("\n") > 3000


def test_known_files_are_the_ones_in_data():
    for digest, split in text.SPLITS.items():
        files = {f: f.name for f in DATA.glob("*.txt")} | {text.BUNDLED_TEXT: "validation"}
        assert any(split[:5] in n and text.sha256_of(f) == digest for f, n in files.items())


def test_passages_are_cut_from_the_start_or_spread():
    tokens = list(range(100))
    assert text.consecutive_passages(tokens, 10, 2) == [tokens[:10], tokens[10:20]]
    assert text.spread_passages(tokens, 10, 2) == [tokens[:10], tokens[50:60]]
    assert text.spread_passages(tokens, 33, 3) == [tokens[:33], tokens[33:66], tokens[66:99]]


@pytest.mark.parametrize("cut", [text.consecutive_passages, text.spread_passages])
@pytest.mark.parametrize("count", [0, 11])
def test_too_many_passages_are_refused(cut, count):
    with pytest.raises(SystemExit, match=f"holds 10 passages of 10 tokens; {count} were"):
        cut(list(range(105)), 10, count)


def test_missing_and_binary_text_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"nothing\.txt does not exist"):
        text.read_text(tmp_path / "nothing.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match=r"bad\.txt is not UTF-8"):
        text.read_text(tmp_path / "bad.txt")


def test_test_text_is_known_by_its_words(tmp_path):
    """Other line ends, no blank lines, or turned into prose: still the test."""
    original = text.read_text(DATA / "wikitext2-test.txt")
    forms = {
        "crlf": original.replace("\n", "\r\n"),
        "dense": "\n".join(line.strip() for line in original.split("\n") if line.strip()),
        "prose": text.detokenise(original),
    }
    for name, form in forms.items():
        path = tmp_path / name
        path.write_bytes(form.encode())
        with pytest.raises(SystemExit, match=r"WikiText-2 test split.*evaluation only"):
            text.refuse_test_text(text.read_text(path), path)
    for path in (DATA / "wikitext2-valid-tokenised.txt", text.BUNDLED_TEXT):
        text.refuse_test_text(text.read_text(path), path)


def test_bundled_text_is_a_part_of_the_validation_split():
    import bundle_text

    bundled = text.read_text(text.BUNDLED_TEXT)
    assert bundled == bundle_text.bundled_text(text.read_text(bundle_text.SOURCE))
    assert text.SPLITS[text.sha256_of(text.BUNDLED_TEXT)] == "validation"
    assert text.BUNDLED_TEXT.stat().st_size < 400_000
    test = set(text.detokenise(text.read_text(DATA / "wikitext2-test.txt")).split("\n"))
    assert not {line for line in bundled.split("\n") if len(line) > 40} & test
    assert (text.BUNDLED_TEXT.parent / "README.md").is_file()


def test_held_out_passages_take_no_part():
    tokens = list(range(1000))
    for count in (1, 2, 8, 50, 99):
        fitted = text.spread_passages(tokens, 10, count)
        held_out = text.held_out_passages(tokens, 10, count)
        assert len(held_out) == min(100 - count, max(1, count // 4))
        used = [token for passage in fitted + held_out for token in passage]
        assert len(used) == len(set(used))
        assert all(len(passage) == 10 for passage in held_out)
    assert text.held_out_passages(tokens, 10, 100) == []
