"""Sealed pages in a folder: one file a block and KV head, whoever wrote it.

A file is safetensors with one tensor, ``pages`` uint8 [bytes]: what the layers hold of one block of
one KV head, in the order of the layers; compressed layers their page, boundary layers K and V as
vLLM has them. A page does not depend on how heads are divided over ranks, so engines of any
tensor-parallel size share a folder.

Nothing in a file is trusted. The folder's name and the file's metadata say what the pages are
(model, recipe, artefact, block), a digest says that they arrived whole, and a file that does not
pass is not used. Neither keeps out somebody who may write into the folder (docs/trust.md).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from kakeya_vllm import config, lib, progress
from kakeya_vllm.config import ConfigError

FORMAT = "kakeya-pages-1"
# A header has one tensor and seven short strings; more is not ours.
MAX_HEADER = 4096


class UnusablePage(ValueError):
    """A file that is not the page it should be: path and reason."""


def identity(vllm_config: Any, model: str) -> dict[str, Any]:
    """What pages depend on, as far as it is known before the model is loaded.

    ``model`` stands for the weights: engines whose weights differ must not call it the same.
    """
    settings = config.resolve(vllm_config.additional_config, vllm_config.model_config)
    artefact = settings.calibration and config.read_artefact(settings.calibration)
    return {
        "format": FORMAT,
        "kakeya": lib.load().version,
        "model": model,
        "model_fingerprint": config.model_fingerprint(vllm_config.model_config.hf_text_config),
        "quantization": str(vllm_config.model_config.quantization),
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "recipe": settings.recipe,
        "calibration": hashlib.sha256(artefact).hexdigest() if artefact else None,
        # With sealed prefill results do not depend on where a page came from; pages of an engine
        # with raw prefill are slightly other ones.
        "prefill": settings.prefill,
        "boundary_skip_layers": list(settings.boundary_skip_layers),
        "boundary_layout": _boundary_layout(vllm_config) if settings.boundary_skip_layers else None,
        "block_hash": vllm_config.cache_config.prefix_caching_hash_algo,
    }


def _boundary_layout(vllm_config: Any) -> str:
    """How vLLM arranges the stock cache of boundary layers on this machine."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return str(current_platform.device_type)
    # vLLM's CPU attention keeps K in tiles of the instruction set's shape.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model = vllm_config.model_config
    return f"cpu {_get_attn_isa(model.dtype, lib.BLOCK_TOKENS, model.get_head_size())}"


class PageFolder:
    """The part of a folder that belongs to one identity.

    ``heads``: KV heads of the whole model. Methods may be called from several threads.
    """

    def __init__(self, root: Path, about: dict[str, Any], heads: int) -> None:
        text = json.dumps(about, sort_keys=True, indent=1)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.directory = root / f"kakeya-{self.identity[:16]}"
        self._root = root
        self._text = text
        self._heads = range(heads)

    def prepare(self, *, write: bool) -> None:
        """Make the folder, or see that it is there; ConfigError if it cannot be used."""
        if self._root.exists() and not self._root.is_dir():
            raise ConfigError(f"folder {self._root} is not a directory")
        if not write:
            if not self._root.is_dir():
                raise ConfigError(
                    f"folder {self._root} does not exist; an engine that only reads "
                    "(kv_consumer) does not make it"
                )
            return
        try:
            progress.write_atomically(self.directory / "identity.json", self._text.encode())
        except OSError as error:
            raise ConfigError(f"folder {self._root} cannot be written to: {error}") from error

    def path(self, block: bytes, head: int) -> Path:
        """The file of a block (vLLM's hash of its tokens and all before them) and KV head."""
        name = block.hex()
        return self.directory / name[:2] / f"{name}.{head}.safetensors"

    def has(self, block: bytes) -> bool:
        """Whether there is a file for every head of a block."""
        return all(self.path(block, head).exists() for head in self._heads)

    def write(self, block: bytes, head: int, pages: torch.Tensor, tables: str) -> None:
        """Keep the pages (uint8 [bytes]) of a block and head, unless they are there. ``tables``:
        fingerprint of the codec that sealed them. OSError if they cannot be written."""
        path = self.path(block, head)
        if not path.exists():
            pages = pages.contiguous()
            about = self._about(block, head, tables) | {"sha256": _digest(pages)}
            progress.write_atomically(path, save({"pages": pages}, metadata=about))

    def read(self, block: bytes, head: int, size: int, tables: str) -> torch.Tensor:
        """The pages of a block and head, uint8 [size]. UnusablePage for a file that is missing,
        damaged, or of other pages; it is deleted, if that is allowed."""
        path = self.path(block, head)
        try:
            return self._read(path, self._about(block, head, tables), size)
        except (OSError, ValueError) as error:
            removed = ""
            if path.exists():
                try:
                    path.unlink()
                    removed = "; it was deleted"
                except OSError:
                    removed = "; it could not be deleted"
            raise UnusablePage(f"{path} is not used: {error}{removed}") from error

    def _read(self, path: Path, about: dict[str, str], size: int) -> torch.Tensor:
        with path.open("rb") as file:
            data = file.read(size + MAX_HEADER + 9)
        # Read, not mapped: a mapped file that somebody cuts kills the process.
        try:
            pages = load(data)["pages"]
            length = int.from_bytes(data[:8], "little")
            found = json.loads(data[8 : 8 + length])["__metadata__"]
        except Exception as error:
            raise ValueError(f"not a whole safetensors file of pages ({error})") from error
        for name, value in about.items():
            if found.get(name) != value:
                raise ValueError(f"its {name} is {found.get(name)}, expected {value}")
        if pages.dtype != torch.uint8 or pages.shape != (size,):
            raise ValueError(f"{pages.dtype} {list(pages.shape)}, expected uint8 [{size}]")
        if found.get("sha256") != _digest(pages):
            raise ValueError("its pages do not have the digest that it names")
        return pages

    def _about(self, block: bytes, head: int, tables: str) -> dict[str, str]:
        return {
            "format": FORMAT,
            "identity": self.identity,
            "tables": tables,
            "block": block.hex(),
            "head": str(head),
        }


def _digest(pages: torch.Tensor) -> str:
    return hashlib.sha256(memoryview(pages.numpy())).hexdigest()
