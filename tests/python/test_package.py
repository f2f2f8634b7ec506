"""The installed distribution: entry points, native library, wheel tag, what it is made of."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import kakeya_vllm
import pytest
import sbom
from kakeya_vllm import lib


def test_vllm_finds_the_plugin():
    points = distribution("kakeya-vllm").entry_points
    (plugin,) = points.select(group="vllm.general_plugins")
    assert (plugin.name, plugin.value) == ("kakeya", "kakeya_vllm.register:register")
    assert callable(plugin.load())
    (command,) = points.select(group="console_scripts", name="kakeya")
    assert callable(command.load())


def test_library_lies_in_the_package():
    library = Path(kakeya_vllm.__file__).parent / "libkakeya.so"
    assert library.read_bytes()[:4] == b"\x7fELF"


def test_calibration_text_lies_in_the_package():
    files = {str(path) for path in distribution("kakeya-vllm").files}
    assert {"kakeya_vllm/data/calibration.txt", "kakeya_vllm/data/README.md"} <= files


def test_version_is_the_package_version():
    assert distribution("kakeya-vllm").version == kakeya_vllm.__version__


def test_wheel_serves_every_python_of_the_platform():
    wheel = distribution("kakeya-vllm").read_text("WHEEL")
    assert "Tag: py3-none-linux_" in wheel
    assert "Root-Is-Purelib: false" in wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this checkout, around the library that these tests load."""
    if not shutil.which("cargo"):
        pytest.skip("a wheel is built where cargo is")
    folder = tmp_path_factory.mktemp("wheel")
    # Built in a copy: setuptools writes beside its sources.
    source = folder / "tree"
    shutil.copytree(sbom.ROOT / "vllm_plugin", source / "vllm_plugin")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "Cargo.toml", "Cargo.lock"):
        shutil.copy(sbom.ROOT / name, source)
    for name in ("scripts", "crates", "csrc"):
        (source / name).symlink_to(sbom.ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)],
        check=True,
        env=os.environ | {"KAKEYA_LIBRARY": str(lib.library_path())},
    )
    (path,) = folder.glob("kakeya_vllm-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_lists_the_crates_of_its_library(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/sboms/kakeya-vllm.cdx.json"))
    document = json.loads(wheel.read(name))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    assert document["metadata"]["component"]["version"] == kakeya_vllm.__version__
    listed = {component["purl"]: component for component in document["components"]}
    assert {"kakeya-codec", "kakeya-ffi", "rayon", "safetensors", "serde_json", "sha2", "half"} <= {
        component["name"] for component in listed.values()
    }
    # Of tests and build scripts, not of the library.
    assert not {"proptest", "object", "cbindgen"} & {c["name"] for c in listed.values()}
    lock = tomllib.loads((sbom.ROOT / "Cargo.lock").read_text())["package"]
    sums = {f"pkg:cargo/{p['name']}@{p['version']}": p.get("checksum") for p in lock}
    for url, component in listed.items():
        found = component.get("hashes", [{"content": None}])[0]["content"]
        assert found == sums[url], url
        assert component["licenses"][0]["expression"], url
    # Every component is reached from the wheel, and nothing is depended on that is not listed.
    graph = {d["ref"]: d["dependsOn"] for d in document["dependencies"]}
    seen, left = set(), [document["metadata"]["component"]["bom-ref"]]
    while left:
        if (ref := left.pop()) not in seen:
            seen.add(ref)
            left += graph[ref]
    assert seen - {f"pkg:pypi/kakeya-vllm@{kakeya_vllm.__version__}"} == set(listed)
    record = next(n for n in wheel.namelist() if n.endswith(".dist-info/RECORD"))
    assert name in wheel.read(record).decode()


def test_wheel_has_the_licences(wheel: zipfile.ZipFile) -> None:
    files = {n.split(".dist-info/")[1]: n for n in wheel.namelist() if ".dist-info/licenses/" in n}
    assert set(files) == {"licenses/LICENSE", "licenses/THIRD_PARTY.txt"}
    text = wheel.read(files["licenses/THIRD_PARTY.txt"]).decode()
    for package in sbom.crates():
        if package["source"]:
            assert f"{package['name']} {package['version']} (" in text
    assert "Permission is hereby granted, free of charge" in text


def test_list_of_third_party_code_is_current() -> None:
    if not shutil.which("cargo"):
        pytest.skip("cargo lists the crates")
    assert sbom.LIST.read_text() == sbom.listing(sbom.crates()), "scripts/sbom.py list"


def test_same_checkout_same_sbom() -> None:
    if not shutil.which("cargo"):
        pytest.skip("cargo lists the crates")
    digests = {
        hashlib.sha256(json.dumps(sbom.sbom(sbom.crates(), "1")).encode()).digest()
        for _ in range(2)
    }
    assert len(digests) == 1
