"""libkakeya from Python: the C ABI through ctypes, one class for the library and one for a codec.

ctypes and not an extension module: the library has a stable C ABI, calls are few (two a layer a
step) and ctypes releases the GIL while a call runs. Structures mirror csrc/include/kakeya.h
field by field; ``struct_size`` lets the library notice a mirror that is out of step.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

ABI_VERSION = 1
LIBRARY_NAME = "libkakeya.so"
BLOCK_TOKENS = 128
HEAD_DIMS = (64, 96, 128, 256)

DTYPE_BF16, DTYPE_F16, DTYPE_F32 = 0, 1, 2
ATTEND_SEALED_PREFILL = 1

OK = 0
CALIBRATION_REQUIRED = 11


class KakeyaError(RuntimeError):
    """A call of libkakeya that did not return KAKEYA_OK.

    ``status`` is the number, ``name`` its name in kakeya.h; the text is the library's own.
    """

    def __init__(self, status: int, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}" if text else name)
        self.status = status
        self.name = name
        self.text = text


class PageLayout(ctypes.Structure):
    """kakeya_page_layout: where the parts of a page lie, in bytes."""

    _fields_ = [
        (name, c_uint32)
        for name in (
            "struct_size",
            "block_tokens",
            "head_dim",
            "layer",
            "page_bytes",
            "header_offset",
            "header_bytes",
            "k_codes_offset",
            "k_codes_and_v_codes_bytes",
            "side_offset",
            "side_bytes",
            "slots_offset",
            "slot_bytes",
            "num_slots",
        )
    ]


class SealArgs(ctypes.Structure):
    """kakeya_seal_args: one whole block of k, v [128][num_heads][D] into pages."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_uint32),
        ("first_head", c_uint32),
        ("num_heads", c_uint32),
        ("dtype", c_uint32),
        ("block_index", c_uint32),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("pages", c_void_p),
        ("page_head_stride", c_int64),
    ]


class WriteArgs(ctypes.Structure):
    """kakeya_write_args: K and V of one step into open blocks and pages."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_uint32),
        ("first_head", c_uint32),
        ("num_heads", c_uint32),
        ("dtype", c_uint32),
        ("num_tokens", c_uint32),
        ("num_blocks", c_uint32),
        ("num_open", c_uint32),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("positions", c_void_p),
        ("pages", c_void_p),
        ("page_block_stride", c_int64),
        ("page_head_stride", c_int64),
        ("open_blocks", c_void_p),
        ("open_slot", c_void_p),
    ]


class AttendArgs(ctypes.Structure):
    """kakeya_attend_args: attention of one step over pages, open blocks and the step's own K, V."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_uint32),
        ("first_head", c_uint32),
        ("num_kv_heads", c_uint32),
        ("num_q_heads", c_uint32),
        ("dtype", c_uint32),
        ("num_seqs", c_uint32),
        ("num_tokens", c_uint32),
        ("num_blocks", c_uint32),
        ("num_open", c_uint32),
        ("max_blocks_per_seq", c_uint32),
        ("flags", c_uint32),
        ("scale", c_float),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_token_stride", c_int64),
        ("q_head_stride", c_int64),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("out", c_void_p),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("pages", c_void_p),
        ("page_block_stride", c_int64),
        ("page_head_stride", c_int64),
        ("open_blocks", c_void_p),
        ("open_slot", c_void_p),
        ("lse", c_void_p),
    ]


class AttendOptions(ctypes.Structure):
    """kakeya_attend_options: a soft cap of scores (0: none) and the address of attention sinks,
    float32 by query head of the call (0: none); for the CUDA functions on the device."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("soft_cap", c_float),
        ("sinks", c_void_p),
    ]


class CudaLimits(ctypes.Structure):
    """kakeya_cuda_limits: what a step on the device holds at most."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("max_seqs", c_uint32),
        ("max_tokens", c_uint32),
        ("max_query", c_uint32),
        ("num_kv_heads", c_uint32),
        ("batch_invariant", c_uint32),
    ]


class CudaBuffers(ctypes.Structure):
    """kakeya_cuda_buffers: sizes of what the caller allocates on the device."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("attend_blocks", c_uint32),
        ("plan_len", c_uint64),
        ("workspace_len", c_uint64),
        ("counters_len", c_uint64),
    ]


class CudaPlanArgs(ctypes.Structure):
    """kakeya_cuda_plan_args: which blocks a step fills, how its attention is divided."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("num_seqs", c_uint32),
        ("max_blocks_per_seq", c_uint32),
        ("num_blocks", c_uint32),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("open_slot", c_void_p),
        ("plan", c_void_p),
        ("stream", c_void_p),
    ]


class CudaWriteArgs(ctypes.Structure):
    """kakeya_cuda_write_args: K and V of one step into open blocks (append) and pages (seal)."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_uint32),
        ("first_head", c_uint32),
        ("dtype", c_uint32),
        ("num_tokens", c_uint32),
        ("num_seqs", c_uint32),
        ("num_blocks", c_uint32),
        ("num_open", c_uint32),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("open_slot", c_void_p),
        ("open_blocks", c_void_p),
        ("plan", c_void_p),
        ("pages", c_void_p),
        ("page_block_stride", c_int64),
        ("page_head_stride", c_int64),
        ("status", c_void_p),
        ("stream", c_void_p),
    ]


class CudaAttendArgs(ctypes.Structure):
    """kakeya_cuda_attend_args: attention of short queries over pages and open blocks."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_uint32),
        ("first_head", c_uint32),
        ("dtype", c_uint32),
        ("num_seqs", c_uint32),
        ("num_tokens", c_uint32),
        ("num_blocks", c_uint32),
        ("num_open", c_uint32),
        ("max_blocks_per_seq", c_uint32),
        ("scale", c_float),
        ("q", c_void_p),
        ("q_token_stride", c_int64),
        ("q_head_stride", c_int64),
        ("out", c_void_p),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("pages", c_void_p),
        ("page_block_stride", c_int64),
        ("page_head_stride", c_int64),
        ("open_blocks", c_void_p),
        ("open_slot", c_void_p),
        ("plan", c_void_p),
        ("workspace", c_void_p),
        ("counters", c_void_p),
        ("stream", c_void_p),
    ]


class CudaOpenArgs(ctypes.Structure):
    """kakeya_cuda_open_args: pages into dense rows."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_uint32),
        ("first_head", c_uint32),
        ("dtype", c_uint32),
        ("count", c_uint32),
        ("num_blocks", c_uint32),
        ("blocks", c_void_p),
        ("pages", c_void_p),
        ("page_block_stride", c_int64),
        ("page_head_stride", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("stream", c_void_p),
    ]


# name -> (argument types); all of these return kakeya_status (int32).
_STATUS_FUNCTIONS: dict[str, list[Any]] = {
    "kakeya_recipe_page_bytes": [c_char_p, c_size_t, c_uint32, POINTER(c_size_t)],
    "kakeya_recipe_describe": [c_char_p, c_size_t, c_void_p, c_size_t, POINTER(c_size_t)],
    "kakeya_recipe_list": [c_void_p, c_size_t, POINTER(c_size_t)],
    "kakeya_codec_new": [
        c_char_p,
        c_size_t,
        c_char_p,
        c_size_t,
        c_char_p,
        c_size_t,
        POINTER(c_void_p),
    ],
    "kakeya_codec_describe": [c_void_p, c_void_p, c_size_t, POINTER(c_size_t)],
    "kakeya_codec_require_fingerprint": [c_void_p, c_char_p, c_size_t],
    "kakeya_codec_page_bytes": [c_void_p, c_uint32, POINTER(c_size_t)],
    "kakeya_codec_page_layout": [c_void_p, c_uint32, POINTER(PageLayout)],
    "kakeya_seal": [c_void_p, POINTER(SealArgs)],
    "kakeya_open": [
        c_void_p,
        c_uint32,
        c_uint32,
        c_void_p,
        c_size_t,
        c_void_p,
        c_void_p,
        c_size_t,
    ],
    "kakeya_write": [c_void_p, POINTER(WriteArgs)],
    "kakeya_attend": [c_void_p, POINTER(AttendArgs)],
    "kakeya_attend_with": [c_void_p, POINTER(AttendArgs), POINTER(AttendOptions)],
    "kakeya_cuda_new": [c_void_p, POINTER(CudaLimits), POINTER(c_void_p)],
    "kakeya_cuda_sizes": [c_void_p, POINTER(CudaBuffers)],
    "kakeya_cuda_plan": [c_void_p, POINTER(CudaPlanArgs)],
    "kakeya_cuda_append": [c_void_p, POINTER(CudaWriteArgs)],
    "kakeya_cuda_seal": [c_void_p, POINTER(CudaWriteArgs)],
    "kakeya_cuda_attend": [c_void_p, POINTER(CudaAttendArgs)],
    "kakeya_cuda_attend_with": [c_void_p, POINTER(CudaAttendArgs), POINTER(AttendOptions)],
    "kakeya_cuda_require_options": [c_void_p, POINTER(AttendOptions)],
    "kakeya_cuda_open": [c_void_p, POINTER(CudaOpenArgs)],
}


def library_path() -> Path:
    """The library that will be loaded: KAKEYA_LIBRARY, else the one inside the package."""
    chosen = os.environ.get("KAKEYA_LIBRARY")
    if chosen:
        path = Path(chosen)
        if not os.path.isfile(path):  # unlike Path's, False for whatever cannot be looked at
            raise FileNotFoundError(f"KAKEYA_LIBRARY names {chosen!r}, which is not a file")
        return path
    path = Path(__file__).parent / LIBRARY_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{LIBRARY_NAME} is not beside {__file__}: the package was installed without its "
            "native library. Reinstall it, build it with `make build`, or name a built one with "
            "KAKEYA_LIBRARY"
        )
    return path


class Library:
    """The loaded C library. Use :func:`load`, which loads it once a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(
                f"{path} cannot be used as {LIBRARY_NAME}: {error}. Build it with `make build`, or "
                "leave KAKEYA_LIBRARY unset to take the one in the package"
            ) from error
        if not hasattr(self._dll, "kakeya_abi_version"):
            raise ImportError(
                f"{path} cannot be used as {LIBRARY_NAME}: it is no libkakeya, it has no "
                "kakeya_abi_version. Leave KAKEYA_LIBRARY unset to take the one in the package"
            )
        self._dll.kakeya_abi_version.restype = c_uint32
        self._dll.kakeya_abi_version.argtypes = []
        found = self._dll.kakeya_abi_version()
        if found != ABI_VERSION:
            raise ImportError(
                f"{path} speaks version {found} of the C interface, this package version "
                f"{ABI_VERSION}: the library and the Python package are of different releases"
            )
        for name in ("kakeya_version", "kakeya_last_error", "kakeya_simd", "kakeya_cuda_archs"):
            getattr(self._dll, name).restype = c_char_p
            getattr(self._dll, name).argtypes = []
        self._dll.kakeya_status_name.restype = c_char_p
        self._dll.kakeya_status_name.argtypes = [c_int32]
        for name in ("kakeya_codec_free", "kakeya_cuda_free"):
            getattr(self._dll, name).restype = None
            getattr(self._dll, name).argtypes = [c_void_p]
        for name, argtypes in _STATUS_FUNCTIONS.items():
            function = getattr(self._dll, name)
            function.restype = c_int32
            function.argtypes = argtypes

    def check(self, status: int) -> None:
        """Raise KakeyaError unless ``status`` is KAKEYA_OK. Call it on the thread of the call."""
        if status != OK:
            # kakeya_last_error is per thread and only valid until the next call on it.
            text = (self._dll.kakeya_last_error() or b"").decode("utf-8", "replace")
            name = (self._dll.kakeya_status_name(status) or b"").decode("ascii", "replace")
            raise KakeyaError(status, name, text)

    def call(self, name: str, *args: Any) -> None:
        """Call a function that returns a status, and check it."""
        self.check(getattr(self._dll, name)(*args))

    def _text(self, name: str, *args: Any) -> str:
        """A function that fills (buf, cap, needed): ask for the size, then for the text."""
        needed = c_size_t()
        self.call(name, *args, None, 0, byref(needed))
        buffer = ctypes.create_string_buffer(needed.value)  # counts the final NUL
        self.call(name, *args, buffer, needed.value, byref(needed))
        return buffer.value.decode("utf-8")

    @property
    def version(self) -> str:
        return self._dll.kakeya_version().decode("ascii")

    @property
    def simd(self) -> str:
        """The instruction set that run-time dispatch chose: avx512, avx2 or portable."""
        return self._dll.kakeya_simd().decode("ascii")

    @property
    def cuda_archs(self) -> str:
        """What the CUDA kernels were compiled for, such as "sm_90 compute_80"; "" without any."""
        return self._dll.kakeya_cuda_archs().decode("ascii")

    def recipe_page_bytes(self, recipe: str, head_dim: int) -> int:
        """Bytes of one page (128 tokens of one KV head). ``recipe``: preset name or JSON."""
        text = recipe.encode("utf-8")
        out = c_size_t()
        self.call("kakeya_recipe_page_bytes", text, len(text), head_dim, byref(out))
        return out.value

    def recipe_describe(self, recipe: str) -> dict[str, Any]:
        """The recipe with every default filled in."""
        text = recipe.encode("utf-8")
        return json.loads(self._text("kakeya_recipe_describe", text, len(text)))

    def recipe_names(self) -> list[str]:
        """Names of the presets that the library ships."""
        return json.loads(self._text("kakeya_recipe_list"))

    def codec(self, recipe: str, model: dict[str, Any], calibration: bytes | None = None) -> Codec:
        """A codec for one model. ``model``: num_layers, num_kv_heads, num_q_heads, head_dim,
        max_position and rope, as kakeya.h describes; ``calibration``: the artefact's bytes."""
        recipe_text = recipe.encode("utf-8")
        model_text = json.dumps(model).encode("utf-8")
        handle = c_void_p()
        self.call(
            "kakeya_codec_new",
            recipe_text,
            len(recipe_text),
            model_text,
            len(model_text),
            calibration,
            len(calibration) if calibration else 0,
            byref(handle),
        )
        return Codec(self, handle)


class Codec:
    """A kakeya_codec: immutable, usable from any thread; freed with the object.

    Tensors are passed by address: the caller keeps them alive and contiguous in head_dim.
    """

    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library = library
        self._handle = handle
        # Bound once: these two are called for every layer of every step.
        self._write = library._dll.kakeya_write
        self._attend = library._dll.kakeya_attend
        self._attend_with = library._dll.kakeya_attend_with

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self.library._dll.kakeya_codec_free(handle)

    def describe(self) -> dict[str, Any]:
        """Name, page_bytes, ratio, quantizer, fingerprint of the static tables, and per layer."""
        return json.loads(self.library._text("kakeya_codec_describe", self._handle))

    def require_fingerprint(self, fingerprint: str) -> None:
        """Refuse pages that a codec with another fingerprint wrote (another recipe, model or
        artefact), with KAKEYA_ERR_WRONG_RECIPE."""
        text = fingerprint.encode("utf-8")
        self.library.call("kakeya_codec_require_fingerprint", self._handle, text, len(text))

    def page_bytes(self, layer: int) -> int:
        out = c_size_t()
        self.library.call("kakeya_codec_page_bytes", self._handle, layer, byref(out))
        return out.value

    def page_layout(self, layer: int) -> PageLayout:
        out = PageLayout(struct_size=ctypes.sizeof(PageLayout))
        self.library.call("kakeya_codec_page_layout", self._handle, layer, byref(out))
        return out

    def seal(self, args: SealArgs) -> None:
        args.struct_size = ctypes.sizeof(SealArgs)
        self.library.call("kakeya_seal", self._handle, byref(args))

    def open(
        self, layer: int, head: int, page: int, page_len: int, k: int, v: int, out_len: int
    ) -> None:
        """One page to float32 k, v [128][D] at the given addresses; out_len floats each."""
        self.library.call("kakeya_open", self._handle, layer, head, page, page_len, k, v, out_len)

    def write(self, args: WriteArgs) -> None:
        self.library.check(self._write(self._handle, byref(args)))

    def attend(self, args: AttendArgs, options: AttendOptions | None = None) -> None:
        if options is None:
            self.library.check(self._attend(self._handle, byref(args)))
        else:
            self.library.check(self._attend_with(self._handle, byref(args), byref(options)))


class CudaCodec:
    """A kakeya_cuda: a codec made ready for one device; freed with the object.

    Tensors are passed by address on the device. The calls launch on the given stream and return.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        device: int,
        max_seqs: int,
        max_tokens: int,
        max_query: int,
        num_kv_heads: int,
        batch_invariant: bool = False,
    ) -> None:
        self.library = codec.library
        limits = CudaLimits(
            ctypes.sizeof(CudaLimits),
            device,
            max_seqs,
            max_tokens,
            max_query,
            num_kv_heads,
            batch_invariant,
        )
        self._handle = c_void_p()
        try:
            self.library.call("kakeya_cuda_new", codec._handle, byref(limits), byref(self._handle))
        except KakeyaError as error:
            # The driver is looked up by name, function by function.
            _, missing, name = error.text.partition("Missing symbol ")
            if not missing:
                raise
            raise KakeyaError(
                error.status,
                "KAKEYA_ERR_CUDA",
                f"the CUDA driver is too old: it has no {name.split(':')[0]}. Install the one that "
                "torch's CUDA version asks for",
            ) from error
        # Bound once: all but open are called for every layer of every step.
        dll = self.library._dll
        self._plan, self._open = dll.kakeya_cuda_plan, dll.kakeya_cuda_open
        self._append, self._seal = dll.kakeya_cuda_append, dll.kakeya_cuda_seal
        self._attend = dll.kakeya_cuda_attend
        self._attend_with = dll.kakeya_cuda_attend_with

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self.library._dll.kakeya_cuda_free(handle)

    def buffers(self) -> CudaBuffers:
        """How large the buffers on the device must be."""
        out = CudaBuffers(struct_size=ctypes.sizeof(CudaBuffers))
        self.library.call("kakeya_cuda_sizes", self._handle, byref(out))
        return out

    def plan(self, args: CudaPlanArgs) -> None:
        self.library.check(self._plan(self._handle, byref(args)))

    def append(self, args: CudaWriteArgs) -> None:
        self.library.check(self._append(self._handle, byref(args)))

    def seal(self, args: CudaWriteArgs) -> None:
        self.library.check(self._seal(self._handle, byref(args)))

    def attend(self, args: CudaAttendArgs, options: AttendOptions | None = None) -> None:
        if options is None:
            self.library.check(self._attend(self._handle, byref(args)))
        else:
            self.library.check(self._attend_with(self._handle, byref(args), byref(options)))

    def require_options(self, options: AttendOptions) -> None:
        """Refuse what attend() would refuse of options in any step."""
        self.library.call("kakeya_cuda_require_options", self._handle, byref(options))

    def open(self, args: CudaOpenArgs) -> None:
        self.library.check(self._open(self._handle, byref(args)))


@functools.cache
def load() -> Library:
    """The library of this process, loaded at the first call."""
    return Library(library_path())
