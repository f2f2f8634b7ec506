"""KAKEYA_CALIBRATION=auto: an engine whose model has no artefact makes one when it starts.

It happens in the process that builds the engine, while its configuration is made: no worker exists
yet, nothing has claimed memory, and every worker is then told the same path. The model runs in a
child process (``python -m kakeya_vllm.auto REQUEST``), whose memory is free again when it ends, on
one device, as `kakeya calibrate` would run it on the bundled text. A lock file keeps engines that
start together from doing the same twice: the second waits and finds the artefact.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kakeya_vllm.config import ConfigError

# Of the engine around, what must not reach the child: its choice of a cache, and its place among
# the ranks of a data-parallel or torchrun launch.
_NOT_INHERITED = (
    "KAKEYA_CALIBRATION",
    "KAKEYA_SEED_CALIBRATION",
    "KAKEYA_RECIPE",
    "KAKEYA_BOUNDARY_SKIP_LAYERS",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_DP_RANK",
    "VLLM_DP_RANK_LOCAL",
    "VLLM_DP_SIZE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def calibrate_once(vllm_config: Any, path: Path, fingerprint: str) -> None:
    """Make the artefact ``path`` of an engine's model unless another process just did.

    Raises ConfigError if the calibration fails; its own messages are on standard error then.
    """
    from vllm.logger import init_logger

    logger = init_logger("vllm.kakeya")
    with locked(path, lambda: logger.info("waiting for the calibration of another process")):
        if path.is_file():
            return
        request = request_of(vllm_config, path, fingerprint)
        logger.info(
            "no calibration artefact for this model: calibrating %s on the bundled text, once "
            "(minutes; it is kept at %s)",
            request["model"],
            path,
        )
        started = time.monotonic()
        code = run_in_child(request)
        if code or not path.is_file():
            raise ConfigError(
                f"KAKEYA_CALIBRATION=auto: the calibration of {request['model']} failed "
                f"(exit {code}); the reason is above. It runs the model on one device. Make the "
                f"artefact with `kakeya calibrate {request['model']}` where the model fits, or "
                "leave KAKEYA_CALIBRATION unset to run a calibration-free recipe"
            )
        logger.info("calibrated in %.0f s", time.monotonic() - started)


@contextlib.contextmanager
def locked(path: Path, waiting: Any) -> Iterator[None]:
    """Only one process at a time makes ``path``; ``waiting()`` is called if that takes waiting.

    The lock belongs to the open file: it goes when its process does, however that ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f"{path.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"KAKEYA_CALIBRATION=auto: nothing can be kept at {path}: {error}"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def request_of(vllm_config: Any, path: Path, fingerprint: str) -> dict[str, Any]:
    """Arguments of calibrate.calibrate for an engine's model: the settings that decide which
    weights are loaded and how, in plain data."""
    model, load, cache = vllm_config.model_config, vllm_config.load_config, vllm_config.cache_config
    if callable(model.hf_overrides):
        raise ConfigError(
            "KAKEYA_CALIBRATION=auto cannot hand hf_overrides that are a function to another "
            "process: run `kakeya calibrate` for that model, or name an artefact"
        )
    settings = {
        "revision": model.revision,
        "code_revision": model.code_revision,
        "tokenizer_revision": model.tokenizer_revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "hf_overrides": model.hf_overrides or None,
        "load_format": str(load.load_format),
        "download_dir": load.download_dir,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
    }
    return {
        "model": str(model.model),
        "tokenizer": str(model.tokenizer or model.model),
        "out": str(path),
        "expected_fingerprint": fingerprint,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }


def run_in_child(request: dict[str, Any]) -> int:
    """Exit code of a fresh interpreter that calibrates; it writes to our standard error only, as
    standard output may be read by whoever started the engine."""
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    with tempfile.TemporaryDirectory(prefix="kakeya-auto-") as directory:
        file = Path(directory, "request.json")
        file.write_text(json.dumps(request))
        command = [sys.executable, "-m", "kakeya_vllm.auto", str(file)]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, check=False
        ).returncode


def main(argv: list[str]) -> int:
    from kakeya_vllm.engine import prepare_environment

    prepare_environment()
    from kakeya_vllm.calibrate import calibrate

    print(f"kakeya: wrote {calibrate(**json.loads(Path(argv[0]).read_text()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
