"""How far a calibration has come, in a file beside its output: an interrupted one goes on there.

The running sums of all layers are written after every passage, so what is lost is one passage at
most. They are float64 and come back bit by bit: a resumed calibration adds the same numbers in the
same order as one that ran through. The file belongs to one model, one list of passages and one
version of the program (``key``); any other is announced and thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Not at import: `kakeya inspect` writes files where there is no torch.
if TYPE_CHECKING:
    import torch

FORMAT = "kakeya-calibration-partial-1"


def key_of(**parts: Any) -> str:
    """SHA-256 over everything that the sums depend on; ``parts`` are plain data."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and the first values of all parameters of a loaded model.

    The config does not tell a fine-tuned model from its base; a few values of each matrix do.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.ndim and parameter.numel():
            row = parameter.detach()[(0,) * (parameter.ndim - 1)][:16]
            digest.update(row.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """``data`` as ``path``: beside it first, then renamed, so no reader ever sees half a file.

    OSError leaves whatever was at ``path`` as it was. A pipe or a device is written to.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            # Some file systems report only here that there was no room, and a rename that reaches
            # the disk before the data would leave an empty file after a crash.
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Progress:
    """The file of one calibration. ``key``: see :func:`key_of`."""

    def __init__(self, target: Path, key: str) -> None:
        self.path = target.with_name(f"{target.name}.partial")
        self.key = key
        self._announced = False

    def load(self, state: dict[str, torch.Tensor]) -> tuple[bool, int, dict] | None:
        """(whether the second pass runs, its passages done, sums), None where there is nothing to
        go on from. ``state``: the sums of a calibration that begins, for their shapes."""
        if not self.path.is_file():
            return None
        import torch

        try:
            second, done, found = self._read()
            for name, empty in state.items():
                if found[name].shape != empty.shape or found[name].dtype != empty.dtype:
                    raise ValueError(f"{name} is {found[name].dtype} {list(found[name].shape)}")
                if not bool(torch.isfinite(found[name]).all()):
                    raise ValueError(f"{name} is not finite")
        except Exception as error:  # whatever is wrong with it, the answer is to begin again
            print(f"kakeya: {self.path} is not used and is removed: {error}", flush=True)
            self.remove()
            return None
        print(
            f"kakeya: going on from {self.path}: {done} passages of pass {1 + second} are done",
            flush=True,
        )
        return second, done, found

    def _read(self) -> tuple[bool, int, dict[str, torch.Tensor]]:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')}, expected {FORMAT}")
            if about.get("key") != self.key:
                raise ValueError("it was begun with another model, text or version")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return about["second"] == "1", int(about["done"]), found

    def save(self, second: bool, done: int, state: dict[str, torch.Tensor]) -> None:
        """``done`` passages of a pass are in the sums. Where they cannot be kept this says so once:
        the calibration goes on, and could only not be resumed."""
        from safetensors.torch import save

        about = {"format": FORMAT, "key": self.key, "second": str(int(second)), "done": str(done)}
        try:
            write_atomically(self.path, save(state, metadata=about))
        except OSError as error:
            if not self._announced:
                print(
                    f"kakeya: progress cannot be kept at {self.path}: {error}. Going on; "
                    "interrupted, this calibration would begin again",
                    flush=True,
                )
            self._announced = True

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
