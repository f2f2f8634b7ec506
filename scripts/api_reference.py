#!/usr/bin/env python3
"""docs/c-api-reference.md, from the comments of kakeya.h and kakeya.hpp.

    scripts/api_reference.py write    # after a change to a header
    scripts/api_reference.py check    # 1 if the page is stale; the tests ask too

tree-sitter parses the headers, so what is documented is what a compiler sees; a declaration without
a comment, or one that is not understood, is an error.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tree_sitter_cpp
from tree_sitter import Language, Node, Parser

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = ROOT / "csrc" / "include"
PAGE = ROOT / "docs" / "c-api-reference.md"
# Half of a block each, which no parser of C++ can place.
GUARDS = (
    '#ifdef __cplusplus\nextern "C" {\n#endif',
    '#ifdef __cplusplus\n} /* extern "C" */\n#endif',
)
# How a paragraph begins that has a name.
LEAD = re.compile(r"^((?:Errors|Threads|Ownership|Memory|Structs|Texts|Tensors|Stability)[.:]) ")
PREAMBLE = """\
# C API reference

Written by `scripts/api_reference.py` from `csrc/include/kakeya.h` and `kakeya.hpp`; the tests
refuse a stale page. [The C ABI](c-abi.md) has the reasons, and
[Sealing and attending from C](c-example.md) whole programs.
"""


class NotUnderstood(Exception):
    """A header holds something that this script would have to leave out."""


@dataclass
class Entry:
    """A declaration as the page shows it; `section` instead of names where a new part begins."""

    names: list[str]
    comment: str
    code: str
    section: str = ""


def parse(text: str) -> Node:
    """The syntax tree of a header."""
    for guard in GUARDS:
        text = text.replace(guard, re.sub(r"[^\n]", " ", guard))
    root = Parser(Language(tree_sitter_cpp.language())).parse(text.encode()).root_node
    if root.has_error:
        raise NotUnderstood("the header does not parse")
    return root


def source(node: Node) -> str:
    return node.text.decode()


def names_of(node: Node) -> list[str]:
    """What a declaration introduces, as a reader would look for it."""
    kind = node.type
    if kind == "preproc_def":
        return [source(node.child_by_field_name("name"))]
    if kind == "type_definition":
        return [source(node.child_by_field_name("declarator"))]
    if kind in ("class_specifier", "struct_specifier"):
        return [source(node.child_by_field_name("name"))]
    if kind == "enum_specifier":
        return []  # named by the typedef that follows
    if kind == "template_declaration":
        return names_of(node.named_children[-1])
    if kind in ("declaration", "function_definition"):
        declarator = node.child_by_field_name("declarator")
        while declarator.type in ("pointer_declarator", "reference_declarator"):
            declarator = declarator.named_children[-1]
        if declarator.type == "function_declarator":
            return [source(declarator.child_by_field_name("declarator"))]
    raise NotUnderstood(f"line {node.start_point.row + 1}: {kind}: {source(node)[:80]}")


def signature(node: Node) -> str:
    """A declaration's text without bodies of functions."""
    text = node.text
    cuts = []

    def visit(inner: Node) -> None:
        if inner.type == "function_definition":
            body = inner.child_by_field_name("body")
            lists = [c for c in inner.children if c.type == "field_initializer_list"]
            if body is not None:
                cuts.append(((lists[0] if lists else body).start_byte, body.end_byte))
            return
        for child in inner.children:
            visit(child)

    visit(node)
    for start, end in sorted(cuts, reverse=True):
        before = text[: start - node.start_byte].rstrip()
        text = before + b";" + text[end - node.start_byte :]
    return text.decode()


def comment_text(comments: list[Node]) -> str:
    """What `//` lines or one `/* */` say, without their marks."""
    if len(comments) == 1 and source(comments[0]).startswith("/*"):
        body = source(comments[0])[2:-2]
        return "\n".join(re.sub(r"^ \* ?", "", line) for line in body.split("\n")).strip("\n")
    return "\n".join(re.sub(r"^// ?", "", source(c)) for c in comments)


def entries(children: list[Node]) -> list[Entry]:
    """The documented declarations among the nodes of a file or a namespace, in order."""
    found: list[Entry] = []
    pending: list[Node] = []
    enum: Entry | None = None
    for node in children:
        if not node.is_named or node.type in ("preproc_include", "identifier"):
            continue
        if node.type == "comment":
            text = source(node)
            if title := re.fullmatch(r"/\* (\d+\. .+) \*/", text):
                found.append(Entry([], "", "", title[1]))
            elif text.startswith("//"):
                if pending and pending[-1].end_point.row + 1 != node.start_point.row:
                    pending = []
                pending.append(node)
            continue
        if node.type == "namespace_definition":
            if source(node.child_by_field_name("name")) != "detail":
                found += entries(node.child_by_field_name("body").children)
            pending = []
            continue
        if node.type == "preproc_def" and node.child_by_field_name("value") is None:
            continue  # the guard against a second inclusion
        comment = comment_text(pending) if follows(pending, node) else ""
        pending = []
        code = signature(node).rstrip()
        if node.type == "enum_specifier":
            enum = Entry([], comment, code + ";")
            continue
        names = names_of(node)
        if node.type.endswith("_specifier"):
            code += ";"
        if enum is not None:
            comment, code = enum.comment, f"{enum.code}\n{code}"
            enum = None
        if not comment:
            raise NotUnderstood(f"{names[0]} has no comment")
        found.append(Entry(names, comment, code))
    if enum is not None:
        raise NotUnderstood("an enum without the typedef that names it")
    return found


def follows(comments: list[Node], node: Node) -> bool:
    """Whether comments stand right before a declaration."""
    return bool(comments) and comments[-1].end_point.row + 1 == node.start_point.row


def declarations(root: Node) -> list[Entry]:
    """Everything that a header declares, inside its guard against a second inclusion."""
    (guard,) = (c for c in root.children if c.type == "preproc_ifdef")
    return entries(guard.children)


def introduction(root: Node) -> str:
    """The comment at the top of a header."""
    comments = []
    for node in root.children:
        if node.type != "comment" or (comments and source(node).startswith("/*")):
            break
        comments.append(node)
    return comment_text(comments)


def prose(text: str, links: set[str], indent: int) -> str:
    """A comment as Markdown: lines that are indented by `indent` or more are kept as they are,
    and what another entry is called becomes a link to it."""
    out: list[str] = []
    block: list[str] = []
    title = False

    def flush() -> None:
        while block and not block[-1].strip():
            block.pop()
        if block:
            least = min(len(line) - len(line.lstrip()) for line in block if line.strip())
            out.extend(["", "```text", *(line[least:] for line in block), "```", ""])
            block.clear()

    for line in text.split("\n"):
        if line.startswith(" " * indent) or (block and not line.strip()):
            block.append(line)
            continue
        flush()
        line = line.strip()
        if re.fullmatch("-{20,}", line):
            title = True
            continue
        line = line.replace("<", "&lt;")
        # A star is emphasis around words, else one of C's.
        line = re.sub(r"\*(?!\w[\w ]*\*)(?<!\w\*)", r"\\*", line)
        line = LEAD.sub(r"**\1** ", line)
        line = re.sub(r"\bkakeya_\w+\b", lambda m: link(m[0], links), line)
        out.append(f"### {line}" if title else line)
        title = False
    flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def link(name: str, links: set[str]) -> str:
    return f"[{name}](#{name})" if name in links else f"`{name}`"


def render() -> str:
    """The page."""
    header = parse((INCLUDE / "kakeya.h").read_text())
    wrapper = parse((INCLUDE / "kakeya.hpp").read_text())
    c, cpp = declarations(header), declarations(wrapper)
    links = {name for entry in c for name in entry.names}
    out = [PREAMBLE, "## kakeya.h", "", prose(introduction(header), links, 4), ""]
    level = "###"
    for part, language in ((c, "c"), (cpp, "cpp")):
        if part is cpp:
            out += ["## kakeya.hpp", "", prose(introduction(wrapper), links, 2), ""]
        for entry in part:
            if entry.section:
                out += [f"## {entry.section}", ""]
                continue
            title = entry.names[0] if part is c else f"kakeya::{entry.names[0]}"
            out += [f"{level} {title}", "", prose(entry.comment, links, 2), ""]
            out += [f"```{language}", entry.code, "```", ""]
    return "\n".join(out)


def main() -> int:
    """0: done; 1: the page is stale."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command not in ("write", "check"):
        raise SystemExit(__doc__)
    try:
        page = render()
    except NotUnderstood as error:
        raise SystemExit(f"{INCLUDE}: {error}") from None
    if command == "write":
        PAGE.write_text(page)
    elif not PAGE.is_file() or PAGE.read_text() != page:
        print(f"{PAGE.relative_to(ROOT)} is stale: scripts/api_reference.py write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
