"""One engine's part of an evaluation: it runs the passages in a process of its own, through one
cache or through several that the same engine serves.

A passage is 2,113 consecutive tokens of the text. Its first 2,048 are one step, whose keys and
values fill 16 blocks; the other 65 are the next step, whose tokens read the cache and, in it,
every earlier token. Their logits predict tokens 2,049 to 2,112: 64 teacher-forced predictions a
passage. The output layer is evaluated in float32 (vLLM's ``head_dtype``): bf16 logits of a size
around 20 are multiples of 1/8, which alone would flip 1 % of the top tokens.

Modes: ``snapshot`` (the prefix attends to itself uncompressed, the cache is compressed once, the
scored tokens read it: what the backend does after a prefill), ``in-forward`` (every layer computes
with the compressed keys and values of the whole prefix, so errors reach the layers above),
``prefix-only`` (in-forward, but only the first ``coded_tokens`` tokens are compressed),
``identity`` (the snapshot path without loss). The real backend runs snapshots of all streams;
everything else is simulated in the stock engine (:mod:`kakeya_vllm.evaluation.simulate`). Mode
``generate`` has no passages of this kind: :mod:`kakeya_vllm.evaluation.generation`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kakeya_vllm import engine
from kakeya_vllm.evaluation.metrics import TokenFigures

SCORED = 64
# The last scored token is predicted by the token before it, hence one more.
PASSAGE = engine.CHUNK + SCORED + 1
MODES = ("snapshot", "in-forward", "prefix-only", "identity", "generate")
STREAMS = ("kv", "k", "v")
BACKEND = "KAKEYA"
REFERENCE = "bf16"
# Passages whose reconstruction error is measured by layer; the codec runs twice on them.
OBSERVED = 2


@dataclass(frozen=True)
class Cache:
    """What an engine keeps its keys and values in.

    ``kind``: "stock" (``name`` is vLLM's kv_cache_dtype, or REFERENCE for none), "kakeya" (``name``
    is a recipe; None leaves it to KAKEYA_RECIPE and the plugin) or "simulated" (one by hooks).
    ``layers``: those that are compressed; None: all.
    """

    label: str
    kind: str
    name: str | None = None
    mode: str = "snapshot"
    streams: str = "kv"
    layers: tuple[int, ...] | None = None
    coded_tokens: int = engine.CHUNK


class Steps:
    """Forward hook on the model: what every step was made of, and the hidden states of the last."""

    def __init__(self, model):
        self.model = model
        self.spans: list[tuple[int, int, int]] = []
        self.hidden = None
        model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, _module, args, kwargs, output):
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        self.spans.append((int(positions[0]), int(positions[-1]), positions.shape[0]))
        self.hidden = output

    def log_probabilities(self, llm, passage: list[int]) -> np.ndarray:
        """Float32 [SCORED, vocabulary]: log-probabilities of tokens CHUNK + 1 .. CHUNK + SCORED."""
        import torch

        self.spans.clear()
        engine.run_prompt(llm, passage)
        rest = SCORED + 1
        expected = [(0, engine.CHUNK - 1, engine.CHUNK), (engine.CHUNK, PASSAGE - 1, rest)]
        if self.spans != expected:
            raise RuntimeError(
                f"the engine ran steps (first position, last position, tokens) {self.spans}; the "
                f"protocol needs {expected}"
            )
        with torch.inference_mode():
            logits = self.model.compute_logits(self.hidden[:SCORED])
            return logits.float().log_softmax(-1).cpu().numpy()


def run_caches(
    model: str,
    passages: list[list[int]],
    caches: list[Cache],
    dtype: str,
    reference: str,
    figures: list[str],
) -> list[dict[str, Any]]:
    """Run the passages through caches that one engine serves (:func:`engine_groups`), one after
    the other; returns what there is to say of each.

    The reference cache writes its log-probabilities into the .npy file ``reference``; others
    compare with it and write their TokenFigures into the .npz file of theirs among ``figures``.
    """
    started = time.monotonic()
    llm = engine_of(model, caches[0], dtype=dtype, hf_overrides={"head_dtype": "float32"})
    steps = engine.on_model(llm, Steps)
    loaded = time.monotonic() - started
    answers = []
    for cache, out in zip(caches, figures, strict=True):
        started = time.monotonic()
        hooks = engine.on_model(llm, lambda module, cache=cache: _hooks(llm, module, cache))
        _run_cache(llm, steps, hooks, passages, cache, reference, out)
        simulated = cache.kind == "simulated"
        answers.append(
            {
                "cache": engine.cache_figures(llm) if not simulated else None,
                "stored": hooks.stored() if simulated else None,
                **_about_kakeya(llm, cache, getattr(hooks, "coder", None)),
                "layer_error": hooks.errors.relative() if hooks else None,
                "dtype": str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
                "load_seconds": loaded,
                "run_seconds": time.monotonic() - started,
            }
        )
    return answers


def _run_cache(
    llm: Any,
    steps: Steps,
    hooks: Any,
    passages: list[list[int]],
    cache: Cache,
    reference: str,
    figures: str,
) -> None:
    from tqdm import tqdm

    is_reference = cache.name == REFERENCE
    rows = None if is_reference else np.load(reference, mmap_mode="r")
    found = TokenFigures.empty(len(passages), SCORED)
    for i, passage in enumerate(tqdm(passages, desc=f"{cache.label}", unit="passage")):
        values = _log_probabilities(llm, steps, hooks, passage, observe=i < OBSERVED)
        if is_reference:
            if rows is None:
                shape = (len(passages), *values.shape)
                rows = np.lib.format.open_memmap(reference, "w+", dtype=np.float32, shape=shape)
            rows[i] = values
        else:
            found.set(i, rows[i], values, np.array(passage[engine.CHUNK + 1 :]))
    if is_reference:
        rows.flush()
    else:
        np.savez(figures, **asdict(found))


def engine_groups(caches: list[Cache]) -> list[list[int]]:
    """Indices of caches by engine: the reference and all simulated caches have the same stock
    engine and share a process; others have one each. In the order of their first."""
    shared = [i for i, cache in enumerate(caches) if _in_stock_engine(cache)]
    groups = [[i] for i in range(len(caches)) if i not in shared]
    return sorted([shared, *groups] if shared else groups)


def _in_stock_engine(cache: Cache) -> bool:
    return cache.kind == "simulated" or (cache.kind == "stock" and cache.name == REFERENCE)


def engine_of(model: str, cache: Cache, **settings: Any) -> Any:
    """The engine that has this cache; ``settings`` are vllm.LLM's."""
    if cache.kind == "kakeya":
        return engine.in_process_engine(model, BACKEND, **settings)
    if cache.kind == "stock" and cache.name != REFERENCE:
        settings["kv_cache_dtype"] = cache.name
    return engine.in_process_engine(model, None, **settings)


def _hooks(llm: Any, module: Any, cache: Cache) -> Any:
    """The hooks that a cache wants; None for stock ones."""
    if cache.kind == "stock":
        return None
    from kakeya_vllm.evaluation.simulate import Coder, Hooks, Identity
    from kakeya_vllm.seed import recipe as seed_recipe
    from kakeya_vllm.seed.coder import SeedCoder

    layers = None if cache.layers is None else set(cache.layers)
    if cache.kind == "kakeya":
        return Hooks(module, Coder(llm, module, cache.name), "observe", layers=layers)
    identity = cache.mode == "identity"
    seed = seed_recipe.find(cache.name)
    if identity:
        coder = Identity()
    elif seed is not None:
        try:
            coder = SeedCoder.of_engine(seed, llm, module)
        except ValueError as error:  # a missing or unfit calibration, an impossible layer
            raise SystemExit(f"kakeya: {error}") from None
    else:
        coder = Coder(llm, module, cache.name)
    mode = "in-forward" if cache.mode == "prefix-only" else "snapshot" if identity else cache.mode
    return Hooks(
        module,
        coder,
        mode,
        streams=cache.streams,
        layers=layers,
        coded_tokens=cache.coded_tokens,
    )


def _log_probabilities(
    llm: Any, steps: Steps, hooks: Any, passage: list[int], *, observe: bool
) -> np.ndarray:
    if hooks is None or (hooks.mode == "observe" and not observe):
        return steps.log_probabilities(llm, passage)
    with hooks.attached():
        if hooks.mode == "snapshot":
            hooks.capture = True
            engine.run_prompt(llm, passage[: engine.CHUNK])
            hooks.capture = False
        before = hooks.fired
        values = steps.log_probabilities(llm, passage)
    if hooks.fired - before != len(hooks.chosen):
        raise RuntimeError(
            f"{hooks.fired - before} attention layers were coded, expected {len(hooks.chosen)}"
        )
    return values


def _about_kakeya(llm: Any, cache: Cache, coder: Any) -> dict[str, Any]:
    """Which recipe and tables an engine ran with, and its open blocks."""
    if cache.kind == "stock" or not hasattr(coder, "describe"):
        return {"codec": None, "open_blocks_bytes": None}
    codec = coder.describe()
    open_blocks = None
    if cache.kind == "kakeya":
        (runtime,) = llm.collective_rpc(lambda worker: worker._kakeya)
        codec["prefill"] = runtime.settings.prefill
        codec["compressed_layers"] = len(runtime.layers)
        open_blocks = sum(layer.impl.open_pool.nbytes for layer in runtime.layers.values())
    return {"codec": codec, "open_blocks_bytes": open_blocks}


def in_child(spec: dict[str, Any], environment: dict[str, str], module: str = __name__) -> Any:
    """``module``'s answer to ``spec``, the arguments of its function with a "cache" or "caches",
    from a fresh interpreter under more variables. Its standard error (progress) is ours."""
    with tempfile.TemporaryDirectory(prefix="kakeya-eval-") as directory:
        request, answer = Path(directory, "request.json"), Path(directory, "answer.json")
        request.write_text(json.dumps(spec, default=asdict))
        command = [sys.executable, "-m", module, str(request), str(answer)]
        done = subprocess.run(command, env=os.environ | environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            caches = spec.get("caches") or [spec["cache"]]
            labels = "; ".join(cache.label for cache in caches)
            raise SystemExit(f"kakeya: the engine for {labels} failed (exit {done.returncode})")
        return json.loads(answer.read_text())


def answer_request(argv: list[str], run: Callable[..., Any]) -> int:
    """Entry of the processes that ``in_child`` starts."""
    request, answer = argv
    engine.prepare_environment()
    spec = json.loads(Path(request).read_text())
    if "caches" in spec:
        spec["caches"] = [Cache(**cache) for cache in spec["caches"]]
    else:
        spec["cache"] = Cache(**spec["cache"])
    Path(answer).write_text(json.dumps(run(**spec)))
    return 0


if __name__ == "__main__":
    sys.exit(answer_request(sys.argv[1:], run_caches))
