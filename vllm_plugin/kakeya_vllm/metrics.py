"""Prometheus metrics of the workers, on the /metrics of the process that serves.

The figures are in the workers, /metrics is answered by the API server, and vLLM carries only its
own statistics between them. So they travel as prometheus_client's multiprocess mode has it: each
worker keeps them in a file that it has mapped, and a collector reads the files of a directory when
it is asked. With several API servers that is how vLLM's own metrics travel as well, and its
directory is used. With one, vLLM keeps its own in memory, and a directory is made for these only.

Not a plugin of vLLM's `vllm.stat_logger_plugins`: its mere presence switches statistics on for
engines that were started with --disable-log-stats, KAKEYA or not, and it sees no worker.

Storing a figure is a write of 16 bytes to memory. Nothing is asked of a device.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kakeya_vllm
from kakeya_vllm import banner

# The directory, from the process that serves to its workers. Not in additional_config, which goes
# into the key of vLLM's compilation cache: a new directory would compile anew at every start.
VARIABLE = "KAKEYA_METRICS_DIR"
BF16_BYTES = 2
_FILE_BYTES = 1 << 16  # as prometheus_client begins them; a worker's entries take about 5 KB

_HELP = {
    "kakeya_tokens_sealed": "Tokens in blocks that became full and were sealed into pages.",
    "kakeya_bytes_saved": "Bytes that a bf16 cache would have taken for sealed tokens, less pages.",
    "kakeya_open_blocks": "Open (uncompressed) blocks in use.",
    "kakeya_open_blocks_peak": "Most open blocks that were in use at once.",
    "kakeya_open_blocks_limit": "Open blocks in the pool.",
    "kakeya_open_blocks_usage": "Open blocks in use, as a part of the pool, 0 to 1.",
    "kakeya_open_blocks_bytes": "Size of the pool of open blocks, all layers.",
    "kakeya_layers": "Layers by cache: compressed, stock, windowed or draft (both stock), state.",
    "kakeya_kv_bytes_per_token": "KV bytes a token, of caches that grow: as allocated, and bf16.",
    "kakeya_recipe_info": "1; recipe and version are in the labels.",
}

_made: tempfile.TemporaryDirectory | None = None
_files: dict[str, Any] = {}


def serve(log_stats: bool) -> None:
    """In the process that builds an engine: show the metrics of its workers among vLLM's own.

    ``log_stats`` False (--disable-log-stats, the default of ``LLM``): there will be none.
    """
    global _made
    os.environ.pop(VARIABLE, None)  # of a process that started this one
    if not log_stats:
        return
    if shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        os.environ[VARIABLE] = shared
        return
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    if _made is None:
        try:
            _made = tempfile.TemporaryDirectory(prefix="kakeya-metrics-")
        except OSError as error:
            _warn("no metrics: there is no directory for them: %s", error)
            return
        MultiProcessCollector(REGISTRY, path=_made.name)
    os.environ[VARIABLE] = _made.name


class WorkerMetrics:
    """What one worker reports, with the labels model_name, engine (data-parallel index) and worker
    (its rank in the engine).

    Figures are of this worker: its layers and KV heads. Tokens are the same on all workers.
    """

    def __init__(self, runtime: Any, kv_cache_config: Any, directory: str) -> None:
        vllm_config = runtime.vllm_config
        self._directory = directory
        self._labels = {
            "model_name": str(vllm_config.model_config.served_model_name),
            "engine": str(vllm_config.parallel_config.data_parallel_index),
            "worker": str(vllm_config.parallel_config.rank),
        }
        specs = banner.layer_specs(kv_cache_config)
        layers = banner.layers_by_cache(runtime, specs)
        compressed = [specs[name] for name in layers["compressed"]]
        growing = banner.growing_specs(layers, specs)
        before, after = banner.bytes_per_token(compressed, BF16_BYTES)
        self._block_tokens = runtime.settings.block_tokens
        self._saved_per_block = (before - after) * self._block_tokens
        self._limit = runtime.open_blocks.num_open if runtime.open_blocks else 0
        self._seen: tuple[int, int] | None = None

        pool = sum(layer.impl.open_pool.nbytes for layer in runtime.layers.values())
        stock, actual = banner.bytes_per_token(growing, BF16_BYTES)
        recipe = "none" if runtime.codec is None else runtime.codec.describe().get("name", "")
        self._gauge("kakeya_recipe_info", recipe=str(recipe), version=kakeya_vllm.__version__)(1)
        for cache, names in layers.items():
            self._gauge("kakeya_layers", cache=cache)(len(names))
        self._gauge("kakeya_kv_bytes_per_token", cache="kakeya")(actual)
        self._gauge("kakeya_kv_bytes_per_token", cache="bfloat16")(stock)
        self._gauge("kakeya_open_blocks_limit")(self._limit)
        self._gauge("kakeya_open_blocks_bytes")(pool)
        self._in_use = self._gauge("kakeya_open_blocks")
        self._peak = self._gauge("kakeya_open_blocks_peak")
        self._usage = self._gauge("kakeya_open_blocks_usage")
        self._sealed = self._counter("kakeya_tokens_sealed")
        self._saved = self._counter("kakeya_bytes_saved")
        self._store(0, 0, 0)

    def update(self, open_blocks: Any) -> None:
        """Take in the bookkeeping of a step."""
        now = open_blocks.sealed_blocks, open_blocks.in_use
        if now != self._seen:
            self._seen = now
            self._store(*now, open_blocks.peak)

    def _store(self, sealed: int, in_use: int, peak: int) -> None:
        self._sealed(sealed * self._block_tokens)
        self._saved(sealed * self._saved_per_block)
        self._in_use(in_use)
        self._peak(peak)
        self._usage(in_use / self._limit if self._limit else 0)

    def _gauge(self, name: str, **labels: str) -> Callable[[float], None]:
        # "mostrecent": a worker that was started anew takes the place of the one before it.
        file, key = self._entry("gauge_mostrecent", name, name, labels)
        return lambda value: file.write_value(key, float(value), time.time())

    def _counter(self, name: str) -> Callable[[float], None]:
        file, key = self._entry("counter", name, f"{name}_total", {})
        base = file.read_value(key)[0]  # where an earlier engine of this process left it
        return lambda value: file.write_value(key, base + value, 0.0)

    def _entry(self, kind: str, name: str, sample: str, labels: dict[str, str]) -> tuple[Any, str]:
        """The mapped file of this process for a kind of metric, and the key of a sample in it."""
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        # One object a file, or they would overwrite each other's entries. The collector takes kind
        # and process from the name; "kakeya" keeps it apart from a file of vLLM's own.
        path = str(Path(self._directory) / f"{kind}_kakeya-{os.getpid()}.db")
        if path not in _files:
            # All of it now: a write to a mapped page that the disk has no room for kills a process.
            with open(path, "a+b") as file:
                os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
            _files[path] = MmapedDict(path)
        labels = self._labels | labels
        names, values = list(labels), list(labels.values())
        return _files[path], mmap_key(name, sample, names, values, _HELP[name])


def of_worker(runtime: Any, kv_cache_config: Any) -> WorkerMetrics | None:
    """The metrics of a worker; None where nobody serves any."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        return None
    try:
        return WorkerMetrics(runtime, kv_cache_config, directory)
    except OSError as error:  # another machine, a full disk
        _warn("no metrics from this worker: %s", error)
        return None


def _warn(message: str, *values: object) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.kakeya").warning(message, *values)
