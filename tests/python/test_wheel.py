"""The release's wheel and sdist: name, contents, size, symbol versions, installed.

`make wheel` builds them and runs this; without KAKEYA_WHEEL and KAKEYA_SDIST it is skipped."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_plugin" / "kakeya_vllm"
GLIBC = (2, 28)
MAX_BYTES = 40_000_000
# Of glibc itself; anything else would have to be on the user's machine by chance.
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|ld-linux-[\w-]+)\.so\.\d+")
GOLDEN = json.loads((ROOT / "tests" / "python" / "seal_digest.json").read_text())


def named(variable: str) -> Path:
    """The file that an environment variable names; skips where it is unset."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: `make wheel` builds a wheel and tests it")
    return Path(os.environ[variable])


@pytest.fixture(scope="module")
def wheel() -> Path:
    return named("KAKEYA_WHEEL")


@pytest.fixture(scope="module")
def machine(wheel: Path) -> str:
    """The processor that the wheel is for, by its name: x86_64 or aarch64."""
    return re.search(r"_(x86_64|aarch64)\.whl$", wheel.name)[1]


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libkakeya.so, unpacked."""
    with zipfile.ZipFile(wheel) as z:
        return Path(z.extract("kakeya_vllm/libkakeya.so", tmp_path_factory.mktemp("library")))


def elf_facts(path: Path) -> dict[str, object]:
    """What a shared object asks of a machine: `machine`, `needed` libraries, the symbol versions
    of each (`versions`, such as GLIBC_2.28), and what it `exports`."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        elf = ELFFile(file)
        dynamic = elf.get_section_by_name(".dynamic")
        versions = elf.get_section_by_name(".gnu.version_r")
        symbols = elf.get_section_by_name(".dynsym")
        return {
            "machine": elf.get_machine_arch(),
            "needed": [t.needed for t in dynamic.iter_tags() if t.entry.d_tag == "DT_NEEDED"],
            "versions": {a.name for _, auxiliary in versions.iter_versions() for a in auxiliary},
            "exports": {
                s.name
                for s in symbols.iter_symbols()
                if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] == "STB_GLOBAL"
            },
        }


def too_new(versions: set[str]) -> set[str]:
    """The symbol versions that are not glibc's, or newer than 2.28."""

    def fits(version: str) -> bool:
        number = re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", version)
        return bool(number) and tuple(map(int, number[1].split("."))) <= GLIBC

    return {version for version in versions if not fits(version)}


@pytest.mark.parametrize(
    ("versions", "bad"),
    [
        ({"GLIBC_2.2.5", "GLIBC_2.28"}, set()),
        ({"GLIBC_2.17", "GLIBC_2.29", "GLIBC_2.34"}, {"GLIBC_2.29", "GLIBC_2.34"}),
        ({"GLIBCXX_3.4.30", "GLIBC_PRIVATE"}, {"GLIBCXX_3.4.30", "GLIBC_PRIVATE"}),
    ],
)
def test_newer_symbols_are_told_from_older(versions: set[str], bad: set[str]) -> None:
    assert too_new(versions) == bad


def test_its_name_says_any_python_3_and_glibc_2_28(wheel: Path, machine: str) -> None:
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())[1]
    tag = f"py3-none-manylinux_2_28_{machine}"
    assert wheel.name == f"kakeya_vllm-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel) as z:
        text = z.read(f"kakeya_vllm-{version}.dist-info/WHEEL").decode()
    assert re.findall(r"^Tag: (.+)$", text, re.M) == [tag]
    assert "Root-Is-Purelib: false" in text


def test_it_is_under_40_megabytes(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        assert z.testzip() is None
        names = {n for n in z.namelist() if not n.endswith("/")}
    sources = {
        str(p.relative_to(PACKAGE.parent))
        for p in PACKAGE.rglob("*")
        if p.suffix in (".py", ".txt", ".md")
    }
    info = {n.split(".dist-info/")[1] for n in names if ".dist-info/" in n}
    assert {n for n in names if ".dist-info/" not in n} == sources | {"kakeya_vllm/libkakeya.so"}
    assert {"licenses/LICENSE", "licenses/THIRD_PARTY.txt", "sboms/kakeya-vllm.cdx.json"} <= info


def test_the_library_asks_for_glibc_2_28_at_most(library: Path, machine: str) -> None:
    facts = elf_facts(library)
    assert facts["machine"] == {"x86_64": "x64", "aarch64": "AArch64"}[machine]
    assert too_new(facts["versions"]) == set()
    assert [n for n in facts["needed"] if not SYSTEM_LIBRARIES.fullmatch(n)] == []


def test_the_library_exports_the_frozen_abi_and_nothing_else(library: Path) -> None:
    frozen = (ROOT / "csrc" / "abi" / "kakeya-1.txt").read_text()
    assert elf_facts(library)["exports"] == set(re.findall(r"^function (\w+) ", frozen, re.M))


def test_no_path_of_the_machine_that_built_it(library: Path) -> None:
    content = library.read_bytes()
    for path in {str(ROOT), os.environ.get("HOME", "/root")}:
        assert path.encode() + b"/" not in content, path


def run(environment: Path, *command: str | Path, **more: str) -> str:
    """Standard output of a command on whose path are an environment's own programs and no others:
    no compiler. Settings of pip and proxies stay."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KAKEYA_", "PYTHON"))}
    env |= {"PATH": str(environment / "bin"), **more}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sealed(environment: Path, **more: str) -> dict[str, Any]:
    """What seal_digest.py prints, run by an environment's Python."""
    # -I: neither this directory nor PYTHONPATH may stand in for what is installed.
    command = (environment / "bin" / "python", "-I", ROOT / "tests" / "python" / "seal_digest.py")
    return json.loads(run(environment, *command, **more))


@pytest.fixture(scope="module")
def installed(wheel: Path, machine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what it depends on, installed without a compiler."""
    if machine != platform.machine():
        pytest.skip(f"a wheel for {machine} does not run on {platform.machine()}")
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(environment, python, "-m", "pip", "install", "-q", "--only-binary=:all:", wheel)
    return environment


def test_installed_it_seals_the_same_bytes(installed: Path) -> None:
    found = sealed(installed)
    assert Path(found["library"]).is_relative_to(installed)
    assert found["pages"] == GOLDEN
    portable = sealed(installed, KAKEYA_SIMD="portable")
    assert (portable["simd"], portable["pages"]) == ("portable", GOLDEN)


def test_installed_it_has_the_kernels(installed: Path) -> None:
    wanted = os.environ["KAKEYA_CUDA_ARCHS"].split()
    names = [f"sm_{arch}" for arch in wanted] + [f"compute_{arch}" for arch in wanted[:1]]
    assert sealed(installed)["archs"].split() == names


def test_installed_it_has_the_command(installed: Path) -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert version in run(installed, installed / "bin" / "kakeya", "--version")
    described = run(installed, installed / "bin" / "kakeya", "inspect", "kakeya-4.6x")
    assert "kakeya-4.6x" in described


def test_the_sdist_has_what_the_library_is_compiled_from() -> None:
    with tarfile.open(named("KAKEYA_SDIST")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "crates", "csrc", "kernels", "scripts", "vllm_plugin"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert set(tracked) - names == set()
    assert {"Cargo.toml", "Cargo.lock", "LICENSE", "pyproject.toml", "setup.py"} <= names
    assert not [n for n in names if n.endswith(".so") or "__pycache__" in n or "target/" in n]


def test_the_sdist_installs_where_rust_is(tmp_path: Path) -> None:
    sdist = named("KAKEYA_SDIST")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("kakeya_vllm-*")
    environment = tmp_path / "installed"
    venv.create(environment, with_pip=True)
    # Kept between runs, so that only the workspace's own crates are compiled each time.
    target = {"CARGO_TARGET_DIR": str(ROOT / "target" / "sdist")}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KAKEYA_", "RUSTFLAGS"))}
    command = [environment / "bin" / "python", "-m", "pip", "install", "-q", "."]
    subprocess.run(command, cwd=source, env=env | target, check=True)
    found = sealed(environment)
    assert (found["pages"], found["archs"]) == (GOLDEN, "")
