"""The documentation as one site: its contents list every page, every link leads somewhere, and
the C API reference says what the headers say. Needs no mdBook."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api_reference
import pytest
import support
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# Read where they lie, on the repository's front page and beside it.
BESIDE = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
INCLUDE = re.compile(r"\{\{#include ([^}:]+)")


def tokens(text: str) -> Iterator[Token]:
    """All tokens of a page, those inside of paragraphs and cells included."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> list[str]:
    """Where a page's links and images lead."""
    found = (t.attrGet("href") or t.attrGet("src") for t in tokens(text))
    return [str(target) for target in found if target]


def anchors(text: str) -> set[str]:
    """The ids of a page's headings, as mdBook and GitHub make them: letters, digits, `-` and `_`
    stay, in lower case, spaces become `-`; a second heading of the same name gets `-1`."""
    seen: Counter[str] = Counter()
    found = set()
    before = None
    for token in tokens(text):
        if token.type == "inline" and before == "heading_open":
            content = "".join(
                t.content for t in token.children or () if t.type in ("text", "code_inline")
            )
            slug = "".join(
                "-" if c.isspace() else c
                for c in unicodedata.normalize("NFC", content.lower())
                if c.isalnum() or c in "-_" or c.isspace()
            )
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        before = token.type
    return found


def dead(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere. Pages of the site may not link out of it by a path:
    the site has only docs/."""
    bad = []
    for target in links(text):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            if url.scheme != "https":
                bad.append(target)
            continue
        path = (page.parent / unquote(url.path)).resolve() if url.path else page
        inside = path.is_relative_to(DOCS) if page.is_relative_to(DOCS) else True
        other = (
            text
            if path == page
            else path.read_text()
            if path.suffix == ".md" and path.is_file()
            else ""
        )
        if not inside or not path.exists() or (url.fragment and url.fragment not in anchors(other)):
            bad.append(target)
    for mention in re.findall(r"`((?:docs/)?[a-z-]+\.md)`", text):
        places = (ROOT / mention, DOCS / mention)
        if not any(p.is_file() for p in places):
            bad.append(mention)
    bad += [path for path in INCLUDE.findall(text) if not (page.parent / path).is_file()]
    return bad


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead(page, page.read_text()) == []


def test_dead_links_are_told_from_others() -> None:
    page = DOCS / "design.md"
    text = (
        "# A head\n\n[a](vllm.md) [b](#a-head) [c](vllm.md#settings) [d](https://example.org)\n"
        "[e](gone.md) [f](#gone) [g](vllm.md#gone) [h](../README.md) [i](http://example.org)\n"
        "`docs/vllm.md` `vllm.md` `docs/gone.md`\n\n    {{#include ../csrc/gone.c}}\n"
    )
    assert dead(page, text) == [
        "gone.md", "#gone", "vllm.md#gone", "../README.md", "http://example.org",
        "docs/gone.md", "../csrc/gone.c",
    ]  # fmt: skip


def test_headings_get_the_ids_of_the_site() -> None:
    text = "## What's `KAKEYA_VERIFY=1`?\n\n### Two\n\n### Two\n"
    assert anchors(text) == {"whats-kakeya_verify1", "two", "two-1"}


def test_the_table_of_contents_lists_every_page_once() -> None:
    listed = links((DOCS / "SUMMARY.md").read_text())
    assert sorted(listed) == [p.name for p in PAGES if p.name != "SUMMARY.md"]


def test_titles_in_the_table_of_contents_are_those_of_the_pages() -> None:
    for title, name in re.findall(r"\[(.+?)\]\((.+?)\)", (DOCS / "SUMMARY.md").read_text()):
        first = (DOCS / name).read_text().splitlines()[0]
        assert first in (f"# {title}", "# KAKEYA"), name


def test_the_c_api_reference_is_current() -> None:
    assert api_reference.PAGE.read_text() == api_reference.render(), (
        "scripts/api_reference.py write"
    )


def test_the_c_api_reference_has_every_function() -> None:
    page = api_reference.PAGE.read_text()
    frozen = (ROOT / "csrc" / "abi" / "kakeya-1.txt").read_text()
    names = re.findall(r"^(?:function|struct|handle) (\w+)", frozen, re.M)
    assert names
    assert [n for n in names if f"\n### {n}\n" not in page] == []


@pytest.mark.parametrize(
    ("declaration", "why"),
    [
        ("int kakeya_new(void);", "kakeya_new has no comment"),
        ("// Far away.\n\nint kakeya_new(void);", "kakeya_new has no comment"),
        ("// A union.\nunion u { int a; };", "union_specifier"),
        ("// Broken.\nint kakeya_new(;", "does not parse"),
    ],
)
def test_what_the_reference_would_leave_out_is_refused(declaration: str, why: str) -> None:
    with pytest.raises(api_reference.NotUnderstood, match=why):
        api_reference.declarations(
            api_reference.parse(f"#ifndef G\n#define G\n{declaration}\n#endif\n")
        )


# What runs and what is refused ---------------------------------------------------------------


def test_the_page_of_support_is_current() -> None:
    assert support.PAGE.read_text() == support.render(), "scripts/support.py write"


def test_refusals_are_read_from_sources() -> None:
    source = """
def check(model):
    found = ["one"]
    found.append(f"two {model}" " and more")
    found.extend(f"three {x}" for x in model)
    other = "not a list"
    raise UnsupportedFeature(["four"], "where")

def parts():
    return ["five"]
"""
    texts = ["one", "five", "two … and more", "three …", "four"]
    assert sorted(support.refusals(source, lists=True)) == sorted(texts)
    assert support.refusals(source, lists=False) == ["four"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ([*support.all_refusals(), "a new one"], "has no line in REFUSALS.*: a new one"),
        ([x for x in support.all_refusals() if x != "ALiBi"], "nothing in the plugin says 'ALiBi'"),
    ],
)
def test_every_refusal_has_a_line_and_every_line_a_refusal(change: list[str], why: str) -> None:
    assert list(support.refusal_tables(support.all_refusals()))
    with pytest.raises(support.NotUnderstood, match=why):
        list(support.refusal_tables(change))


@pytest.mark.parametrize(
    ("test", "where", "why"),
    [
        ("engine::gone", None, "no test test_engine.py::test_gone"),
        ("gone::gone", None, "no test test_gone.py::test_gone"),
        ("gpu_engine::drafts_change_nothing", "cpu", "does not run on the cpu"),  # of the file
        ("connectors::answers_stay_the_same_under_load", "gpu", "does not run on the gpu"),
        ("engine::forced_preemption_loses_nothing", "gpu", "does not run on the gpu"),  # by a name
    ],
)
def test_tests_that_do_not_show_it_are_refused(test: str, where: str | None, why: str) -> None:
    with pytest.raises(support.NotUnderstood, match=why):
        support.shown_by((test,), where)
    shown = ("engine::forced_preemption_loses_nothing", "engine::capacity_grows_by_the_ratio")
    assert support.shown_by(shown, "cpu") == "`test_engine.py`"


def test_figures_are_those_of_their_tables() -> None:
    row = support.figures(DOCS / "quality.md", "SmolLM2-135M", "fp8")
    assert (row["ratio"], row["verdict"]) == ("2.00x", "MARGINAL")
    for heading, name in [("SmolLM2-135M", "kakeya-9.9x"), ("No such model", "fp8")]:
        with pytest.raises(support.NotUnderstood, match=f"no row {name} under {heading}"):
            support.figures(DOCS / "quality.md", heading, name)


def test_examples_of_the_c_book_are_run_by_ctest() -> None:
    programs = {p.stem for p in (ROOT / "csrc" / "examples").glob("*.c")}
    (listed,) = re.findall(
        r"foreach\(name ([\w ]+)\)\n  add_executable\(\$\{name\} \.\./\.\./csrc/examples",
        (ROOT / "tests" / "capi" / "CMakeLists.txt").read_text(),
    )
    included = INCLUDE.findall((DOCS / "c-example.md").read_text())
    assert set(listed.split()) == programs == {Path(p).stem for p in included}
