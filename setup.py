"""Puts libkakeya.so into the wheel and tags the wheel for its platform.

The library is the C ABI of the Rust workspace in this directory and is reached through ctypes, so
one wheel serves every Python 3 of a platform and its user needs no compiler. KAKEYA_LIBRARY names
a library that is built already; otherwise cargo builds it, around the CUDA kernels that
scripts/kernels.sh compiled, where it did. The same from an unpacked sdist (MANIFEST.in).

The wheel's dist-info says what is in the library: an SBOM (PEP 770) and the licences of its
crates, from Cargo.lock (scripts/sbom.py).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

LIBRARY = "libkakeya.so"
WORKSPACE = Path(__file__).resolve().parent


def native_library() -> Path:
    """The library to ship: KAKEYA_LIBRARY, else a release build of the workspace."""
    chosen = os.environ.get("KAKEYA_LIBRARY")
    if chosen:
        path = Path(chosen)
    else:
        cargo = os.environ.get("CARGO", "cargo")
        if not shutil.which(cargo):
            raise SystemExit(
                f"{cargo} not found: kakeya-vllm is built with a Rust toolchain (1.90 or newer). "
                f"A wheel needs none; or name a built {LIBRARY} with KAKEYA_LIBRARY"
            )
        env = dict(os.environ)
        kernels = WORKSPACE / "target" / "kernels"
        if "KAKEYA_KERNELS" not in env and (kernels / "archs.txt").is_file():
            env["KAKEYA_KERNELS"] = str(kernels)
        if not env.get("KAKEYA_KERNELS"):
            print(
                f"warning: {LIBRARY} is built without CUDA kernels, for the CPU only; "
                "scripts/kernels.sh compiles them first",
                file=sys.stderr,
            )
        command = [cargo, "build", "--release", "--locked", "-p", "kakeya-ffi"]
        subprocess.run(command, cwd=WORKSPACE, env=env, check=True)
        path = (
            Path(os.environ.get("CARGO_TARGET_DIR") or WORKSPACE / "target") / "release" / LIBRARY
        )
    if not path.is_file():
        raise SystemExit(
            f"{path} is not a file: build it with `cargo build --release -p kakeya-ffi`"
        )
    return path


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        target = Path(self.build_lib) / "kakeya_vllm" / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(native_library(), target)


def bill_of_materials(command: str) -> bytes:
    """What scripts/sbom.py prints for a command, `sbom` or `texts`."""
    script = WORKSPACE / "scripts" / "sbom.py"
    if not script.is_file() or not shutil.which(os.environ.get("CARGO", "cargo")):
        raise SystemExit(
            f"a wheel lists the crates of its {LIBRARY}: that takes cargo and {script}"
        )
    return subprocess.run([sys.executable, script, command], check=True, capture_output=True).stdout


class PlatformWheel(bdist_wheel):
    """Any Python 3, no Python ABI, this platform."""

    def egg2dist(self, egginfo_path, distinfo_path):
        super().egg2dist(egginfo_path, distinfo_path)
        # setuptools has no setting for SBOMs, nor for licence texts that are made on the way.
        sboms, licenses = Path(distinfo_path) / "sboms", Path(distinfo_path) / "licenses"
        for folder in (sboms, licenses):
            folder.mkdir(exist_ok=True)
        (sboms / "kakeya-vllm.cdx.json").write_bytes(bill_of_materials("sbom"))
        (licenses / "THIRD_PARTY.txt").write_bytes(bill_of_materials("texts"))

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Makes the wheel platform-specific although no extension module is compiled."""

    def has_ext_modules(self):
        return True


setup(
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
