"""Every place where KAKEYA changes vLLM: what, why, and when the change can go.

How: a patch is applied right after vLLM imports the module it changes, and never imports one by
itself, so a process that has no attention layer pays nothing. All patches wrap: the original runs,
and for engines that did not select KAKEYA nothing else does. Applying a patch twice does nothing.

| patch | changes | goes away when |
|---|---|---|
| engine_args | EngineArgs.create_engine_config | vLLM offers a start-up hook for backends |
| cpu_platform | CpuPlatform.get_attn_backend_cls | the CPU platform honours the selected backend |
| platform, and cpu_platform | update_block_size_for_backend | pages are counted whole there |
| attention_layer | Attention.__init__ | vLLM selects a backend per layer |
| cpu_model_runner | CPUModelRunner._zero_block_ids | it knows of kernel blocks |
| transfer.register | nothing; names two connectors | connectors have entry points of their own |
| worker | Worker.load_model, initialize_from_config, execute_model | see the functions below |
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kakeya_vllm import register, selection, transfer, version

_MARK = "_kakeya_wrapped"


def install(*, all_patches: bool) -> None:
    """Install the patches. ``all_patches`` False (untested vLLM): only the one that refuses."""
    when_imported("vllm.engine.arg_utils", engine_args)
    if all_patches:
        when_imported("vllm.platforms.cpu", cpu_platform)
        when_imported("vllm.platforms.interface", platform)
        when_imported("vllm.model_executor.layers.attention.attention", attention_layer)
        when_imported("vllm.v1.worker.gpu_worker", worker)
        when_imported("vllm.v1.worker.cpu_model_runner", cpu_model_runner)
        when_imported("vllm.distributed.kv_transfer.kv_connector.factory", transfer.register)


# ---------------------------------------------------------------------------------------------


def engine_args(module: ModuleType) -> None:
    """Bring back VLLM_ATTENTION_BACKEND for one name, and check a configuration where it is made.

    Why: vLLM removed the variable (vllm-project/vllm#26315; that it is ignored silently is
    #50292). Everything that starts an engine goes through create_engine_config, so this is also
    the one place where an unsupported feature can be refused before any process is spawned.
    How: set ``attention_backend`` before, check and resolve settings after. An explicit flag wins.
    A kv_cache_dtype that names KAKEYA selects it here too, and is "auto" for vLLM: its processes
    need not know the name, and register_kv_cache_dtype (0.33) is not needed for it.
    Goes away when vLLM offers a start-up hook for out-of-tree backends.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            selection.by_cache_dtype(self)
            selection.by_environment(self)
            if register.is_ours(self.attention_backend):
                version.require()
                register.require_ownership()
            vllm_config = original(self, *args, **kwargs)
            if register.is_selected(vllm_config):
                _prepare(vllm_config)
                from kakeya_vllm import metrics

                metrics.serve(log_stats=not self.disable_log_stats)
            return vllm_config

        return create_engine_config

    _wrap(module.EngineArgs, "create_engine_config", wrap)


def _prepare(vllm_config: Any) -> None:
    """Refuse what cannot work, then fix the settings for all processes of the engine."""
    from vllm.logger import init_logger

    from kakeya_vllm import auto, config, runtime, support

    logger = init_logger("vllm.kakeya")
    version.require()
    register.require_ownership()
    unknown = config.unknown_variables()
    if unknown:
        logger.warning_once(
            "unknown variables %s are not read; known: %s",
            ", ".join(unknown),
            ", ".join(config.VARIABLES),
        )
    support.check_config(vllm_config)
    settings = config.resolve(
        vllm_config.additional_config,
        vllm_config.model_config,
        calibrate=functools.partial(auto.calibrate_once, vllm_config),
    )
    support.check_settings(settings, vllm_config)
    if settings.seed is not None:
        # As --block-size would: the CPU platform then leaves it alone, and vLLM does not take the
        # backend that it remembers from an engine with pages of 128 tokens.
        vllm_config.cache_config.block_size = settings.block_tokens
        vllm_config.cache_config.user_specified_block_size = True
    runtime.check_artefact(vllm_config, settings)
    transfer.adopt(vllm_config)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            config.KEY: settings.to_dict(),
        }


def cpu_platform(module: ModuleType) -> None:
    """Let the CPU platform use the selected backend.

    Why: CpuPlatform.get_attn_backend_cls answers CPU_ATTN whatever is selected (0.32, 0.33).
    How: answer with our class if it was selected and accepts the layer, like CudaPlatform does.
    Goes away when the CPU platform looks at ``selected_backend``.
    """

    def wrap(original: classmethod) -> classmethod:
        @functools.wraps(original.__func__)
        def get_attn_backend_cls(
            cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
        ) -> str:
            if not register.is_ours(selected_backend):
                return original.__func__(
                    cls, selected_backend, attn_selector_config, *args, **kwargs
                )
            from kakeya_vllm import backend, config

            if config.current().seed is not None:
                from kakeya_vllm.seed import backend as seed_backend

                seed_backend.SeedBackend.require(attn_selector_config)
                return seed_backend.PATH
            backend.KakeyaBackend.require(attn_selector_config)
            return register.BACKEND_PATH

        return classmethod(get_attn_backend_cls)

    _wrap(module.CpuPlatform, "get_attn_backend_cls", wrap)
    _wrap(module.CpuPlatform, "update_block_size_for_backend", _wrap_block_size)


def platform(module: ModuleType) -> None:
    """Choose the blocks of a hybrid model.

    Why: _align_hybrid_block_size asks the backend for the bytes of one token, to find how many a
    state takes, and a token's share of a page is no whole number of bytes.
    How: see hybrid.py. Other models go the original way. CpuPlatform has a method of its own.
    Goes away when vLLM asks for the bytes of a block that the backend supports.
    """
    _wrap(module.Platform, "update_block_size_for_backend", _wrap_block_size)


def _wrap_block_size(original: classmethod) -> classmethod:
    @functools.wraps(original.__func__)
    def update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
        from kakeya_vllm import hybrid

        if hybrid.aligns(vllm_config):
            hybrid.align(vllm_config)
        else:
            original.__func__(cls, vllm_config)

    return classmethod(update_block_size_for_backend)


def attention_layer(module: ModuleType) -> None:
    """Give boundary layers, sliding-window layers and a drafter's layers the stock backend.

    Why: vLLM selects backends per kind of layer (AttentionConfig.backend_per_kind), not per layer
    number, and a boundary layer must be exactly the stock one. A sliding-window layer keeps few
    tokens, and its backend must be vLLM's own choice as well. One model runner (V2, 0.33) hands the
    backend on to a draft model, whose layers have no recipe.
    How: build such a layer while no backend is selected, so vLLM chooses as it would without us.
    Goes away when vLLM can select a backend by layer number (TurboQuant's boundary layers go
    through kv_cache_dtype_skip_layers, which changes the dtype and not the backend).
    """

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            from vllm.config import get_current_vllm_config

            vllm_config = get_current_vllm_config()
            if not register.is_selected(vllm_config):
                return original(self, *args, **kwargs)
            from kakeya_vllm import config, support

            attention = vllm_config.attention_config
            prefix = kwargs.get("prefix", "")
            num_layers = vllm_config.model_config.get_total_num_hidden_layers()
            drafting = vllm_config.speculative_config is not None
            if (
                kwargs.get("per_layer_sliding_window") is not None
                or (drafting and support.is_draft_layer(prefix, num_layers))
                or support.layer_index(prefix) in config.current().boundary_skip_layers
            ):
                saved = attention.backend, attention.backend_per_kind
                attention.backend, attention.backend_per_kind = None, {}
                try:
                    original(self, *args, **kwargs)
                finally:
                    attention.backend, attention.backend_per_kind = saved
            else:
                original(self, *args, **kwargs)
                support.check_layer(self)

        return __init__

    _wrap(module.Attention, "__init__", wrap)


def cpu_model_runner(module: ModuleType) -> None:
    """Leave the pages of a hybrid model as they are when vLLM takes a block into use.

    Why: _zero_block_ids (0.32, 0.33) takes the scheduler's block ids for indices of a layer's
    cache. Where a block is several pages it would zero pages of other blocks. Ours need no zeros:
    a page is read once it was sealed, never before.
    How: do nothing, since all attention layers of such a model are compressed; states are not its
    business. Goes away when the CPU's runner zeroes kernel blocks, as the GPU's does.
    """

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
            from kakeya_vllm import hybrid

            if not hybrid.aligns(self.vllm_config):
                original(self, block_ids)

        return _zero_block_ids

    _wrap(module.CPUModelRunner, "_zero_block_ids", wrap)


def worker(module: ModuleType) -> None:
    """Follow a worker through its life: settings, codec, open blocks.

    Why, by method:
    * load_model: settings must be known before the first layer is built, and the codec needs the
      rotary frequencies of the loaded model. No backend hook sees the model.
    * initialize_from_config: the number of blocks is known here; the block-id map and the banner
      need it.
    * execute_model: open blocks belong to requests, and only SchedulerOutput says which blocks a
      request owns, when it was preempted, aborted or finished. Attention metadata has no request.
    How: call runtime.py before or after the original. CPUWorker and both model runners inherit
    these three methods. Goes away when vLLM has slots for per-request state of a backend
    (vllm-project/vllm#42449 moves the KV spec to the backend, a first step).
    """

    def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not register.is_selected(self.vllm_config):
                return original(self, *args, **kwargs)
            from kakeya_vllm import config, runtime, support

            version.require()
            support.check_config(self.vllm_config)
            settings = config.from_vllm(self.vllm_config)
            result = original(self, *args, **kwargs)
            self._kakeya = runtime.Runtime.for_worker(self, settings)
            return result

        return load_model

    def wrap_initialize(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def initialize_from_config(self: Any, kv_cache_config: Any, *args: Any, **kw: Any) -> Any:
            runtime = getattr(self, "_kakeya", None)
            if runtime is not None:
                runtime.bind(kv_cache_config)
            return original(self, kv_cache_config, *args, **kw)

        return initialize_from_config

    def wrap_execute(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            runtime = getattr(self, "_kakeya", None)
            if runtime is None:
                return original(self, scheduler_output, *args, **kwargs)
            runtime.before_step(scheduler_output)
            try:
                return original(self, scheduler_output, *args, **kwargs)
            finally:
                runtime.after_step()

        return execute_model

    _wrap(module.Worker, "load_model", wrap_load)
    _wrap(module.Worker, "initialize_from_config", wrap_initialize)
    _wrap(module.Worker, "execute_model", wrap_execute)


# ---------------------------------------------------------------------------------------------


def _wrap(owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrap(original)``, once."""
    original = owner.__dict__[name]
    if getattr(getattr(original, "__func__", original), _MARK, False):
        return
    wrapped = wrap(original)
    target = wrapped.__func__ if isinstance(wrapped, classmethod) else wrapped
    setattr(target, _MARK, True)
    setattr(owner, name, wrapped)


def when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Apply ``patch`` to a module now if it is imported, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        patch(module)
    else:
        _finder().pending.setdefault(name, patch)


class _Loader(importlib.abc.Loader):
    """Runs a patch after the real loader has executed the module."""

    def __init__(self, loader: Any, patch: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Leave no trace: the module's own loader is the one that pickles, reloads and inspects.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a pending module through the other finders and wraps its loader."""

    def __init__(self) -> None:
        self.pending: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self.pending.pop(name, None)  # popped first: the search below comes back here
        if patch is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, patch)
                return spec
        return None


def _finder() -> _Finder:
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            return finder
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    return finder
