"""What can go wrong around an engine: a clear message and an end, and nothing half-written.

The table in docs/trust.md names the test of each fault.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import psutil
import pytest
import torch
from kakeya_vllm import allocation, calibrate, config, cuda, lib, progress, runtime
from kakeya_vllm.config import ConfigError
from test_artefact import SHAPE, artefact, statistics, vllm_config
from test_cuda import settings
from test_processes import request
from test_support import configure

PYTHONPATH = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def script(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Python code in a process (and session) of its own."""
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


# --- processes ------------------------------------------------------------------------------

FRONT_END = """
import sys
import engines

if __name__ == "__main__":
    made = engines.Engine(
        sys.argv[1], skip_tokenizer_init=True, distributed_executor_backend="mp",
        tensor_parallel_size=int(sys.argv[2]), dtype=engines.exact_dtype(),
    )
    print("READY", flush=True)
    while True:
        made.run([engines.tokens(i, 300) for i in range(4)], 30)
"""


def mapped_shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Files in /dev/shm that processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            maps = process.memory_maps()
            found |= {m.path for m in maps if m.path.startswith("/dev/shm/")}
    return found


@contextlib.contextmanager
def front_end(command: list[str], log: Path, ready: Callable[[str], bool]) -> Iterator[Any]:
    """A front end that has started (``ready`` of its output) and the processes under it; all of
    them are gone when the block ends, at the latest."""
    spawned = {
        "PYTHONPATH": PYTHONPATH,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as out:
        # To a file: a pipe stays open as long as any process under the front end has it.
        front = subprocess.Popen(
            command, env=os.environ | spawned, stdout=out, stderr=subprocess.STDOUT
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 300
        while not ready(log.read_text()):
            assert front.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < deadline, log.read_text()[-8000:]
            time.sleep(0.5)
        family = psutil.Process(front.pid).children(recursive=True)
        yield front, family
    finally:
        for process in [front, *family]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        front.wait()


def kill(family: list[psutil.Process], name: str) -> None:
    """SIGKILL to the last of the processes with this in its name."""
    chosen = [p for p in family if name in " ".join([p.name(), *p.cmdline()])]
    assert chosen, [(p.name(), p.cmdline()) for p in family]
    os.kill(chosen[-1].pid, signal.SIGKILL)


def test_a_killed_worker_ends_the_engine(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL while requests run: the front end says so and ends, and so does every other process.
    Shared memory is vLLM's alone."""
    log = tmp_path / "log"
    ranks = 1 if engines.on_gpu() else 2
    command = [sys.executable, "-u", "-c", FRONT_END, str(tiny), str(ranks)]
    with front_end(command, log, lambda text: "READY" in text) as (front, family):
        shared = mapped_shared_memory([*family, psutil.Process(front.pid)])
        assert not [path for path in shared if "kakeya" in path]
        time.sleep(1)  # into the run
        kill(family, "Worker")
        assert front.wait(180) not in (0, None)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    text = log.read_text()
    assert "EngineDeadError" in text, text[-8000:]
    assert "died unexpectedly" in text, text[-8000:]


def test_a_killed_engine_core_ends_the_server(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The same for the process above the workers. `vllm serve`, because the LLM class of vLLM 0.32
    waits for ever for a core that was killed, with any cache."""
    model = engines.add_byte_tokenizer(engines.make_tiny_model(tmp_path_factory.mktemp("served")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--attention-backend", "KAKEYA"]
    command += ["--dtype", engines.exact_dtype(), "--enforce-eager", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", str(engines.KV_BYTES)]
    command += ["--tensor-parallel-size", "1" if engines.on_gpu() else "2"]
    command += ["--served-model-name", "m", "--distributed-executor-backend", "mp"]
    command += engines.memory_arguments()
    log = tmp_path / "log"
    address = f"http://127.0.0.1:{port}"
    with front_end(command, log, lambda text: "startup complete" in text) as (front, family):
        body = {"model": "m", "prompt": "1 2 3", "max_tokens": 900, "ignore_eos": True}
        with request(address, body | {"stream": True}) as answer:
            answer.readline()  # it runs
            kill(family, "EngineCore")
            rest = answer.read().decode()
        assert '"error"' in rest
        assert front.wait(180) is not None
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    text = log.read_text()
    assert "EngineDeadError" in text, text[-8000:]


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.cpu_only
def test_memory_that_is_refused_is_named(tiny: Path) -> None:
    """The limit of the process leaves room for an engine, but not for open blocks of so many
    sequences: what they are and what to change is said, and the process ends."""
    code = """
        import re, resource, sys
        import engines
        import torch, vllm.v1.worker.cpu_model_runner

        size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        limit = size + 4 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        options = {"skip_tokenizer_init": True, "dtype": "float32"}
        engines.Engine(
            sys.argv[1], max_num_seqs=20_000, max_num_batched_tokens=20_000, **options
        )
    """
    process = script(code, str(tiny))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1, said[-4000:]
    assert "there is no memory for the 20016 open blocks of a layer (5,004 MiB)" in said
    assert "--max-num-seqs" in said


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_refusals_of_memory_are_told_from_other_errors(error: Exception, translated: bool) -> None:
    expected = allocation.OutOfMemory if translated else type(error)
    with pytest.raises(expected) as seen, allocation.allocating("x", 3 * 2**20, "change y"):
        raise error
    if translated:
        assert "there is no memory for x (3 MiB): change y" in str(seen.value)
        assert seen.value.__cause__ is error
    else:
        assert seen.value is error


@pytest.mark.parametrize(
    ("refused", "what"),
    [(1, "the workspace of the attention kernel"), (2, "the workspace of prefill")],
)
def test_a_gpu_without_memory(monkeypatch: pytest.MonkeyPatch, refused: int, what: str) -> None:
    """The device refuses one of the worker's allocations."""
    from fake_cuda import FakeCudaCodec

    allocations = 0
    empty = torch.empty

    def scarce(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal allocations
        allocations += 1
        if allocations == refused:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(allocation.OutOfMemory, match=f"no memory for {what}.*lower max_"):
        cuda.CudaWorker(
            settings(0),
            {"head_dim": 128, "num_q_heads": 4, "num_kv_heads": 2},
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            num_kv_heads=2,
            head_size=128,
            num_open=4,
            make=FakeCudaCodec,
        )


# --- disk -----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(directory: Path, nbytes: int) -> Iterator[str]:
    """A file system without room for more than ``nbytes``. Gives the words of the refusal; where
    this process may not mount anything, files are limited instead (see test_a_full_disk)."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(directory)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        yield "No space left on device" if mounted else "File too large"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A real calibration whose cache is on a full disk: its progress cannot be kept, which is said
    once; nor can the artefact, which ends it. Nothing is left."""
    model = engines.make_tiny_model(tmp_path_factory.mktemp("full-disk"))
    engines.add_byte_tokenizer(model)
    code = """
        import resource, sys
        from kakeya_vllm import progress

        original = progress.os.fsync
        if sys.argv[2] == "File too large":
            limit = 12288
            def write(path, data, original=progress.write_atomically):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    original(path, data)
                finally:
                    resource.setrlimit(
                        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            progress.write_atomically = write
        from kakeya_vllm.cli import main
        sys.exit(main(["calibrate", sys.argv[1], "--tokens", "2048"]))
    """
    with small_disk(tmp_path / "disk", 12288) as refusal:
        env = {"KAKEYA_CACHE": str(tmp_path / "disk")}
        process = script(code, str(model), refusal, env=env)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 1, said[-4000:]
        assert said.count("kakeya: progress cannot be kept at") == 1, said[-4000:]
        assert refusal in said
        assert "kakeya: the artefact (" in said
        assert "nothing was written. Make room, or name another place" in said
        left = [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]
        assert left == []


def test_a_write_that_fails_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call refuses: the old file stays whole, and nothing lies beside it."""
    path = tmp_path / "a.safetensors"
    progress.write_atomically(path, b"before")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(SystemExit, match=r"cannot be written to .*No space left on device"):
                calibrate.write_artefact(path, b"after" * 1000)
        assert path.read_bytes() == b"before"
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    calibrate.write_artefact(path, b"after")
    assert path.read_bytes() == b"after"


def test_a_writer_that_is_killed_leaves_no_artefact(tmp_path: Path) -> None:
    """Killed between the data and the rename, as at any other moment before it."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from kakeya_vllm import progress

        progress.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        progress.write_atomically(Path(sys.argv[1]), b"x" * 100000)
    """
    path = tmp_path / "a.safetensors"
    process = script(code, str(path))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    progress.write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_output_that_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    progress.write_atomically(pipe, b"figures")
    assert os.read(reader, 100) == b"figures"
    os.close(reader)


def test_an_artefact_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """By the process that builds an engine, with its path, whatever is missing."""
    whole = artefact(statistics())
    path = tmp_path / "artefact.safetensors"

    def start(path: Path) -> None:
        config.check_metadata(path, "x")
        chosen = config.Settings("kakeya-4.6x", str(path), (), "raw")
        runtime.check_artefact(vllm_config(), chosen)

    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1}
    for cut in sorted(cuts | set(range(0, len(whole), 997))):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=str(path)):
            start(path)
    path.write_bytes(whole)
    start(path)


def test_a_cut_artefact_of_the_seed_is_refused(tmp_path: Path) -> None:
    from kakeya_vllm.seed import calibration

    about = {"format": calibration.FORMAT, "model_fingerprint": "x"}
    whole = calibrate.artefact_bytes({"sigma_q": torch.zeros(2, 2, 64, 64)}, about)
    path = tmp_path / "seed.safetensors"
    for cut in (5, 100, 1000, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises((ConfigError, calibration.CalibrationError), match=str(path)):
            calibration.load(path, "x", (2, 2, 64))


# --- drivers --------------------------------------------------------------------------------

OPEN_DEVICE = """
    import json, sys
    from kakeya_vllm import lib

    codec = lib.load().codec("kakeya-free-4.6x", json.loads(sys.argv[1]))
    try:
        lib.CudaCodec(codec, device=0, max_seqs=4, max_tokens=64, max_query=1, num_kv_heads=2)
    except lib.KakeyaError as error:
        print(f"REFUSED {error}")
"""

# A driver that only says whether it starts. 0: it does, and lacks the functions of newer ones; 803:
# it is older than the kernel's part of it; 100: there is no device.
DRIVER = """
int cuInit(unsigned flags) { return %d; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "refused"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "REFUSED"; return 0; }
"""


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "the CUDA driver is too old: it has no cu"),
        (803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        (100, "CUDA_ERROR_NO_DEVICE"),
        (None, "no CUDA driver: libcuda.so was not found"),
    ],
)
@pytest.mark.cpu_only
def test_a_driver_that_cannot_be_used_is_named(
    tmp_path: Path, status: int | None, words: str
) -> None:
    env = {}
    if status is not None and shutil.which("cc"):
        (tmp_path / "driver.c").write_text(DRIVER % status)
        library = tmp_path / "libcuda.so.1"
        built = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")]
        subprocess.run(built, check=True)
        (tmp_path / "libcuda.so").symlink_to(library)
        env["LD_LIBRARY_PATH"] = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    process = script(OPEN_DEVICE, json.dumps(SHAPE), env=env)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    refusals = [line for line in said.splitlines() if line.startswith("REFUSED ")]
    assert refusals, said
    if not lib.load().cuda_archs:
        assert "built without kernels" in refusals[0]
    elif status is None or shutil.which("cc"):
        assert words in refusals[0]


# --- settings -------------------------------------------------------------------------------

LONG = "x" * 5000
GARBAGE = [
    "\x01\x7f",
    "🦀" * 40,
    LONG,
    "../" * 2000,
    "%s%n{}",
    "-1",
    "null",
    "\udcff\udcfe",
    "~no/x",
]
GARBAGE += ["9" * 5000, "[" * 5000, '{"base":' * 3000, "/dev/zero", "/proc/self/mem", "/", "0;1"]


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "variable",
    [
        "KAKEYA_RECIPE",
        "KAKEYA_CALIBRATION",
        "KAKEYA_BOUNDARY_SKIP_LAYERS",
        "KAKEYA_PREFILL",
    ],
)
def test_garbage_in_a_variable_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for value in GARBAGE:
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError) as error:
            configure(tmp_path)
        named = variable in str(error.value) or value in str(error.value)
        assert named, f"{value[:40]!r}: {error.value}"


@pytest.mark.cpu_only
def test_garbage_in_the_other_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is none means no artefact; one that cannot be is refused. Anything but 1
    does not allow another vLLM."""
    for value in ["\x01", "🦀", "/dev/null", str(tmp_path / "nowhere")]:
        monkeypatch.setenv("KAKEYA_CACHE", value)
        assert configure(tmp_path).additional_config["kakeya"]["calibration"] == ""
    monkeypatch.setenv("KAKEYA_CACHE", LONG)
    with pytest.raises(ConfigError, match="KAKEYA_CACHE"):
        configure(tmp_path)
    monkeypatch.delenv("KAKEYA_CACHE")
    for value in GARBAGE:
        monkeypatch.setenv("KAKEYA_RECIPE", "v1.3-ppl")
        monkeypatch.setenv("KAKEYA_SEED_CALIBRATION", value)
        with pytest.raises(ConfigError):
            configure(tmp_path)
    for value in GARBAGE:
        monkeypatch.setenv("KAKEYA_LIBRARY", value)
        with pytest.raises((FileNotFoundError, ImportError), match="KAKEYA_LIBRARY"):
            lib.Library(lib.library_path())


def test_a_library_that_is_none(tmp_path: Path) -> None:
    text = tmp_path / "libkakeya.so"
    text.write_text("not a library")
    other = ctypes.util.find_library("c") or "libc.so.6"
    for path in (text, Path(other)):
        with pytest.raises(ImportError, match=r"cannot be used as libkakeya\.so"):
            lib.Library(path)
