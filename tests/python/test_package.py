"""The installed distribution: entry points, native library, wheel tag."""

from importlib.metadata import distribution
from pathlib import Path

import kakeya_vllm


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
