"""The C ABI from Python: frozen facts, mirrors of structs, libraries of other versions."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import abi
import pytest
from kakeya_vllm import lib

HEADER = abi.HEADER.read_text()
FROZEN = abi.read(abi.FROZEN / f"kakeya-{lib.ABI_VERSION}.txt")
# The struct of kakeya.h that a class of lib.py mirrors.
MIRRORS = {
    "kakeya_page_layout": lib.PageLayout,
    "kakeya_seal_args": lib.SealArgs,
    "kakeya_write_args": lib.WriteArgs,
    "kakeya_attend_args": lib.AttendArgs,
    "kakeya_attend_options": lib.AttendOptions,
    "kakeya_cuda_limits": lib.CudaLimits,
    "kakeya_cuda_buffers": lib.CudaBuffers,
    "kakeya_cuda_plan_args": lib.CudaPlanArgs,
    "kakeya_cuda_write_args": lib.CudaWriteArgs,
    "kakeya_cuda_attend_args": lib.CudaAttendArgs,
    "kakeya_cuda_open_args": lib.CudaOpenArgs,
}


def test_header_is_of_the_version_that_python_speaks() -> None:
    assert abi.version(HEADER) == lib.ABI_VERSION == lib.load()._dll.kakeya_abi_version()


def test_the_header_keeps_what_was_frozen() -> None:
    broken, new = abi.compare(FROZEN, abi.facts(HEADER))
    assert (broken, new) == ([], []), "scripts/abi.py check"
    assert abi.C_TEST.read_text() == abi.c_test(FROZEN, lib.ABI_VERSION), "scripts/abi.py freeze"


CHANGES = {
    "a number": ("KAKEYA_ERR_OVERFLOW = 4,", "KAKEYA_ERR_OVERFLOW = 40,", 1),
    "an order": (
        "  uint32_t first_head;\n  // KV heads of k, v and pages.\n  uint32_t num_heads;",
        "  uint32_t num_heads;\n  uint32_t first_head;",
        2,
    ),
    "a type": ("float *lse;\n} kakeya_attend_args", "double *lse;\n} kakeya_attend_args", 1),
    "a size": (
        "float *lse;\n} kakeya_attend_args",
        "float *lse; int more;\n} kakeya_attend_args",
        1,
    ),
    "a parameter": (
        "void kakeya_codec_free(kakeya_codec *codec)",
        "void kakeya_codec_free(int *codec)",
        1,
    ),
    "a result": ("uint32_t kakeya_abi_version(void)", "uint64_t kakeya_abi_version(void)", 1),
    "a name": ("kakeya_recipe_list(", "kakeya_recipes(", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(name: str) -> None:
    before, after, facts = CHANGES[name]
    assert HEADER.count(before) == 1, f"the header has it {HEADER.count(before)} times: {before}"
    broken, _ = abi.compare(FROZEN, abi.facts(HEADER.replace(before, after)))
    assert len(broken) == facts, broken


def test_an_addition_is_none() -> None:
    more = "uint32_t kakeya_more(const char *what, size_t len);\nvoid kakeya_codec_free("
    broken, new = abi.compare(FROZEN, abi.facts(HEADER.replace("void kakeya_codec_free(", more)))
    assert (broken, new) == ([], ["function kakeya_more uint32_t (const char *, size_t)"])


def test_mirrors_of_structs() -> None:
    """Every field of every struct: offset, size, kind of type, order."""
    kinds = {"int32_t": "i", "uint32_t": "I", "int64_t": "l", "uint64_t": "L", "float": "f"}
    seen = {}
    for line in FROZEN:
        kind, name, *rest = line.split()
        if kind == "struct":
            assert ctypes.sizeof(MIRRORS[name]) == int(rest[0]), name
            seen[name] = []
        elif kind == "field":
            struct, field = name.split(".")
            mirror = getattr(MIRRORS[struct], field)
            assert (mirror.offset, mirror.size) == (int(rest[0]), int(rest[1])), name
            of = dict(MIRRORS[struct]._fields_)[field]
            assert of._type_ == ("P" if "*" in rest else kinds[rest[2]]), name
            seen[struct].append(field)
    assert seen == {name: [f for f, _ in mirror._fields_] for name, mirror in MIRRORS.items()}


def test_numbers_and_functions() -> None:
    frozen = {line.split()[1]: line.split()[2:] for line in FROZEN}
    for name in (
        "OK",
        "DTYPE_BF16",
        "DTYPE_F16",
        "DTYPE_F32",
        "ATTEND_SEALED_PREFILL",
        "BLOCK_TOKENS",
    ):
        assert int(frozen[f"KAKEYA_{name}"][0]) == getattr(lib, name), name
    assert int(frozen["KAKEYA_ERR_CALIBRATION_REQUIRED"][0]) == lib.CALIBRATION_REQUIRED
    for name, argtypes in lib._STATUS_FUNCTIONS.items():
        returns, *parameters = " ".join(frozen[name]).split(" ", 1)
        assert returns == "kakeya_status", name
        assert len(parameters[0].split(",")) == len(argtypes), name
        for parameter, of in zip(parameters[0].strip("()").split(", "), argtypes, strict=True):
            sizes = {"size_t": 8, "uint32_t": 4}
            size = 8 if "*" in parameter else sizes[parameter]
            assert ctypes.sizeof(of) == size, f"{name}: {parameter}"


def library(folder: Path, source: str) -> Path:
    """A shared library of a line of C."""
    path = folder / "libother.so"
    (folder / "other.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-o", str(path), str(folder / "other.c")]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("other", [0, lib.ABI_VERSION + 1])
def test_a_library_of_another_version_is_refused(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library(tmp_path, f"unsigned kakeya_abi_version(void) {{ return {other}; }}")
    monkeypatch.setenv("KAKEYA_LIBRARY", str(path))
    words = f"speaks version {other} of the C interface, this package version {lib.ABI_VERSION}"
    with pytest.raises(ImportError, match=words):
        lib.Library(lib.library_path())


def test_another_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="it is no libkakeya"):
        lib.Library(library(tmp_path, "int unrelated;"))


def test_the_version_is_asked_of_the_library_too() -> None:
    require = lib.load()._dll.kakeya_require_abi
    assert require(lib.ABI_VERSION) == lib.OK
    with pytest.raises(lib.KakeyaError, match="KAKEYA_ERR_WRONG_VERSION: the caller was compiled"):
        lib.load().check(require(lib.ABI_VERSION + 1))


def test_pages_of_another_recipe_are_refused() -> None:
    model = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "num_q_heads": 1,
        "head_dim": 64,
        "max_position": 256,
    }
    codecs = [
        lib.load().codec(r, model | {"rope": None})
        for r in ("kakeya-free-4.6x", "kakeya-free-5.3x")
    ]
    mine, theirs = (codec.describe()["fingerprint"] for codec in codecs)
    codecs[0].require_fingerprint(mine)
    with pytest.raises(lib.KakeyaError, match="KAKEYA_ERR_WRONG_RECIPE") as refused:
        codecs[0].require_fingerprint(theirs)
    assert theirs in refused.value.text
