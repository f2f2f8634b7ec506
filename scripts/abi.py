#!/usr/bin/env python3
"""The ABI that csrc/include/kakeya.h describes, as facts, and its comparison with the frozen one.

    scripts/abi.py show      # the facts of the header as it is
    scripts/abi.py check     # against csrc/abi/kakeya-<KAKEYA_ABI_VERSION>.txt; 1 if one changed
    scripts/abi.py freeze    # adds what is new, there and in tests/capi/frozen_abi.c

A fact is a line: a constant and its number, a struct and its size, a field and its offset, a
function and its types. Names of parameters are no part of it. Numbers come from a C compiler ($CC,
else cc) on this machine: LP64, as all that is supported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "include" / "kakeya.h"
FROZEN = ROOT / "csrc" / "abi"
C_TEST = ROOT / "tests" / "capi" / "frozen_abi.c"
VERSION = "KAKEYA_ABI_VERSION"


def version(text: str) -> int:
    """KAKEYA_ABI_VERSION of a header's text."""
    return int(re.search(rf"#define {VERSION} (\d+)", text)[1])


def squeeze(text: str) -> str:
    """One space between words, none before a star's name."""
    return re.sub(r"\s*\*\s*", " *", re.sub(r"\s+", " ", text)).strip()


def types_of(parameters: str) -> str:
    """`const char *recipe, size_t len` as `const char *, size_t`."""
    if squeeze(parameters) == "void":
        return "void"
    return ", ".join(re.sub(r"\w+$", "", squeeze(p)).strip() for p in parameters.split(","))


def parse(text: str) -> list[tuple[str, ...]]:
    """What the header declares, in its order: ("constant", NAME), ("typedef", NAME, TYPE),
    ("struct", NAME), ("field", STRUCT, NAME, TYPE), ("handle", NAME),
    ("function", NAME, RETURNS, TYPES)."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    found: list[tuple[str, ...]] = []
    pattern = re.compile(
        r"#define (?P<define>KAKEYA_\w+) \d+"
        r"|enum \{(?P<enum>.*?)\};"
        r"|typedef struct \{(?P<fields>.*?)\} (?P<struct>\w+);"
        r"|typedef struct (?P<handle>\w+) (?P=handle);"
        r"|typedef (?P<type>\w+) (?P<name>\w+);"
        r"|(?P<returns>(?:const )?\w+ \*?)(?P<function>kakeya_\w+)\((?P<parameters>[^)]*)\);",
        re.S,
    )
    for m in pattern.finditer(text):
        if m["define"]:
            found.append(("constant", m["define"]))
        elif m["enum"] is not None:
            found += [("constant", name) for name in re.findall(r"(\w+) =", m["enum"])]
        elif m["struct"]:
            found.append(("struct", m["struct"]))
            for field in filter(None, (squeeze(f) for f in m["fields"].split(";"))):
                of, name = re.fullmatch(r"(.*?)(\w+)", field).groups()
                found.append(("field", m["struct"], name, of.strip()))
        elif m["handle"]:
            found.append(("handle", m["handle"]))
        elif m["type"]:
            found.append(("typedef", m["name"], m["type"]))
        else:
            found.append(
                ("function", m["function"], squeeze(m["returns"]), types_of(m["parameters"]))
            )
    left = re.sub(r'#\w+[^\n]*|extern "C" \{|\}', "", pattern.sub("", text)).split()
    if left:
        raise SystemExit(f"{HEADER}: not understood: {' '.join(left)[:200]}")
    return found


def facts(text: str) -> list[str]:
    """A header's ABI, in its order: a C program over it is compiled and run."""
    lines = []
    for kind, *rest in parse(text):
        if rest[0] == VERSION:
            continue
        if kind == "constant":
            lines.append(f'printf("constant %s %lld\\n", "{rest[0]}", (long long){rest[0]});')
        elif kind == "typedef":
            name, of = rest
            lines.append(f'printf("type {name} %zu {of}\\n", sizeof({name}));')
        elif kind == "struct":
            lines.append(f'printf("struct {rest[0]} %zu\\n", sizeof({rest[0]}));')
        elif kind == "field":
            struct, name, of = rest
            at = f"offsetof({struct}, {name}), sizeof((({struct} *)0)->{name})"
            lines.append(f'printf("field {struct}.{name} %zu %zu {of}\\n", {at});')
        elif kind == "handle":
            lines.append(f'puts("handle {rest[0]}");')
        else:
            name, returns, types = rest
            lines.append(f'puts("function {name} {returns} ({types})");')
    body = "\n  ".join(lines)
    includes = '#include <stddef.h>\n#include <stdio.h>\n#include "kakeya.h"\n'
    source = f"{includes}int main(void) {{\n  {body}\n  return 0;\n}}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "facts")
        Path(folder, "facts.c").write_text(source)
        Path(folder, "kakeya.h").write_text(text)
        cc = os.environ.get("CC", "cc").split()
        subprocess.run([*cc, "-o", str(program), f"{program}.c"], check=True)
        run = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


def compare(frozen: list[str], now: list[str]) -> tuple[list[str], list[str]]:
    """Facts that are no longer so, and facts that are new."""
    return [line for line in frozen if line not in now], [
        line for line in now if line not in frozen
    ]


def read(path: Path) -> list[str]:
    """The facts of a frozen file; comments and blank lines left out."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def c_test(frozen: list[str], number: int) -> str:
    """The frozen facts as a C11 program: it does not compile if a number or a type differs, nor
    link if a function is gone."""
    out = [
        f"/* ABI {number} as it was frozen, checked by the compiler and the linker.",
        " * Written by `scripts/abi.py freeze`; not edited. */",
        "",
        "/* clang-format off */",
        "#include <stddef.h>",
        "#include <stdio.h>",
        "",
        '#include "kakeya.h"',
        "",
        f'_Static_assert({VERSION} == {number}, "another ABI than the frozen one");',
    ]
    calls = []
    for line in frozen:
        kind, name, *rest = line.split(" ", 2)
        rest = rest[0] if rest else ""
        if kind == "constant":
            out.append(f'_Static_assert({name} == {rest}, "{name}");')
        elif kind in ("type", "struct"):
            out.append(f'_Static_assert(sizeof({name}) == {rest.split()[0]}, "{name}");')
        elif kind == "field":
            struct, field = name.split(".")
            offset, size, of = rest.split(" ", 2)
            out.append(f'_Static_assert(offsetof({struct}, {field}) == {offset}, "{name}");')
            out.append(f'_Static_assert(sizeof((({struct} *)0)->{field}) == {size}, "{name}");')
            # A generic selection takes the type itself, not one that converts to it.
            of = of + "*" if of.endswith("*") else of + " *"
            same = f"_Generic(&(({struct} *)0)->{field}, {of}: 1, default: 0)"
            out.append(f'_Static_assert({same}, "{name}");')
        elif kind == "function":
            returns, types = re.fullmatch(r"(.*?) ?\((.*)\)", rest).groups()
            calls.append((name, returns, types))
    out += ["", "int main(void) {"]
    for name, returns, types in calls:
        # The definition in the library, found by the linker and by the loader.
        space = "" if returns.endswith("*") else " "
        out.append(f"  {returns}{space}(*volatile {name}_)({types}) = {name};")
    out.append("  int missing = 0;")
    out += [f"  missing += {name}_ == NULL;" for name, _, _ in calls]
    out += [
        f"  missing += kakeya_abi_version() != {number};",
        '  if (missing == 0) puts("frozen_abi: ok");',
        "  return missing;",
        "}",
    ]
    return "\n".join(out) + "\n"


def main() -> int:
    """0: fine; 1: something that was frozen has changed; the reason on stdout."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    text = HEADER.read_text()
    number = version(text)
    now = facts(text)
    path = FROZEN / f"kakeya-{number}.txt"
    if command == "show":
        print("\n".join(now))
        return 0
    if command not in ("check", "freeze"):
        raise SystemExit(__doc__)
    frozen = read(path) if path.is_file() else []
    broken, new = compare(frozen, now)
    if broken:
        print(f"The ABI of version {number} has changed; raise {VERSION} or take it back:")
        for line in broken:
            print(f"- {line}")
            like = " ".join(line.split(" ")[:2]) + " "
            print(*(f"+ {other}" for other in now if other.startswith(like)), sep="\n")
        return 1
    if command == "freeze":
        head = f"# ABI {number} of libkakeya: what no later library of this version may change.\n"
        head += "# scripts/abi.py says what a line means.\n"
        FROZEN.mkdir(exist_ok=True)
        path.write_text(head + "\n".join([*frozen, *new]) + "\n")
        C_TEST.write_text(c_test(read(path), number))
        print(f"{path.relative_to(ROOT)}: {len(frozen)} facts, {len(new)} added")
        return 0
    if new:
        print("Not frozen yet (scripts/abi.py freeze adds them):", *new, sep="\n+ ")
        return 1
    if C_TEST.read_text() != c_test(frozen, number):
        print(f"{C_TEST.relative_to(ROOT)} is stale: scripts/abi.py freeze")
        return 1
    print(f"ABI {number}: {len(frozen)} facts, none changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
