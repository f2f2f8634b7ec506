"""One worker's KAKEYA: the codec, the open-block bookkeeping, and who uses them.

Made once a worker, right after the model is loaded (the codec needs the model's rotary angles)
and before vLLM profiles memory. All compressed layers share it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kakeya_vllm import banner, config, hybrid, lib, metrics, rope, support
from kakeya_vllm.config import ConfigError, Settings
from kakeya_vllm.cuda import CudaWorker
from kakeya_vllm.open_blocks import OpenBlocks, lookback_tokens, pool_size
from kakeya_vllm.verify import Verifier


class Runtime:
    """What the layers of one worker share.

    ``open_blocks`` exists once :meth:`bind` was called, unless no layer here is compressed.
    """

    def __init__(self, vllm_config: Any, settings: Settings, layers: dict[str, Any], codec: Any):
        self.vllm_config = vllm_config
        self.settings = settings
        self.layers = layers  # name -> vLLM Attention layer, compressed ones only
        self.group = 0  # index of the compressed layers' group among vLLM's KV-cache groups
        self.pages_per_block = 1  # of vLLM's blocks; more for a hybrid model
        self.codec = codec
        self.open_blocks: OpenBlocks | None = None
        self.cuda: CudaWorker | None = None
        self.verifier: Verifier | None = None
        self.metrics: metrics.WorkerMetrics | None = None

    @classmethod
    def for_worker(cls, worker: Any, settings: Settings) -> Runtime:
        """Find the compressed layers of a loaded worker, make the codec and hand it to them."""
        from kakeya_vllm.impl import KakeyaImpl

        vllm_config = worker.vllm_config
        context = vllm_config.compilation_config.static_forward_context
        layers = {
            name: layer
            for name, layer in context.items()
            if isinstance(getattr(layer, "impl", None), KakeyaImpl)
        }
        _check_layers(layers, _model_shape(vllm_config), vllm_config)
        _share_blocks(vllm_config, settings, layers)
        codec = None
        if layers:
            codec = make_codec(worker.get_model(), list(layers), vllm_config, settings)
        runtime = cls(vllm_config, settings, layers, codec)
        if layers and worker.device.type == "cuda":
            runtime._make_cuda(worker.device)
        if layers and settings.verify:
            runtime._make_verifier()
        first_head = first_kv_head(vllm_config)
        for name, layer in layers.items():
            layer.impl.bind(runtime, support.layer_index(name), first_head)
        return runtime

    def bind(self, kv_cache_config: Any) -> None:
        """Take the KV cache's size; called before vLLM allocates it and builds metadata."""
        if self.layers:
            self._make_open_blocks(kv_cache_config)
        if self.cuda is not None:
            self.cuda.bind(kv_cache_config.num_blocks * self.pages_per_block)
        if self.verifier is not None:
            self.verifier.open_blocks = self.open_blocks
        self.metrics = metrics.of_worker(self, kv_cache_config)
        banner.log(self, kv_cache_config)

    def before_step(self, scheduler_output: Any) -> None:
        """Follow the requests of one SchedulerOutput, before the model runs it."""
        if self.open_blocks is not None:
            self.open_blocks.update(scheduler_output)
            if self.metrics is not None:
                self.metrics.update(self.open_blocks)
        if self.cuda is not None:
            self.cuda.before_step(self.open_blocks)
        if self.verifier is not None:
            self.verifier.live = True

    def after_step(self) -> None:
        """The model has run (on a GPU: is queued)."""
        if self.cuda is not None:
            self.cuda.live = False
        if self.verifier is not None:
            self.verifier.live = False

    def _make_verifier(self) -> None:
        self.verifier = Verifier(
            self.codec,
            head_dim=next(iter(self.layers.values())).head_size,
            sealed_prefill=self.settings.prefill == "sealed",
            max_query=None if self.cuda is None else self.cuda.max_query,
            seed=self.vllm_config.model_config.seed or 0,
        )

    def _make_cuda(self, device: Any) -> None:
        layer = next(iter(self.layers.values()))
        pool = layer.impl.open_pool
        self.cuda = CudaWorker(
            self.vllm_config,
            self.codec,
            device=device,
            dtype=pool.dtype,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            num_open=pool.shape[0] - 1,
        )

    def _make_open_blocks(self, kv_cache_config: Any) -> None:
        groups = kv_cache_config.kv_cache_groups
        ours = [i for i, group in enumerate(groups) if self.layers.keys() & set(group.layer_names)]
        if len(ours) > 1:
            # vLLM cuts layers of one kind into groups of as many as the rarest kind has.
            raise support.UnsupportedFeature(
                [
                    f"compressed layers in {len(ours)} KV cache groups (valid: 1; this model has "
                    "more full-attention layers than layers of another kind)"
                ]
            )
        (self.group,) = ours
        spec = groups[self.group].kv_cache_spec
        block_size = spec.block_size
        valid = self.settings.block_tokens
        whole = hybrid.is_hybrid(self.vllm_config.model_config) and block_size % valid == 0
        if block_size != valid and not whole:
            raise support.UnsupportedFeature(
                [f"block size {block_size} (valid: {valid}, the codec's block)"]
            )
        self.pages_per_block = block_size // valid
        self.open_blocks = OpenBlocks(
            kv_cache_config.num_blocks,
            pool_size(self.vllm_config),
            group=self.group,
            lookback=lookback_tokens(self.vllm_config),
            block_tokens=valid,
            pages_per_block=self.pages_per_block,
        )


def _share_blocks(vllm_config: Any, settings: Settings, layers: dict[str, Any]) -> None:
    """Where full-attention layers are compressed and sliding-window layers are not: let a block of
    either take the same bytes.

    vLLM draws blocks for layers of all kinds from one pool, so it would pad a page of 128 tokens to
    128 stock tokens. Instead a windowed layer's block holds as many tokens as a page's bytes do
    (vLLM's own choice, from skip_page_size_padded, made for layers that keep a larger dtype), and a
    page is padded if not even the smallest block that the windowed layer's backend takes fits.
    """
    from kakeya_vllm.backend import KakeyaBackend

    KakeyaBackend.shared_block_bytes = None
    context = vllm_config.compilation_config.static_forward_context
    windowed = [
        layer
        for layer in context.values()
        if getattr(layer, "sliding_window", None) is not None and hasattr(layer, "attn_backend")
    ]
    if not layers or not windowed:
        return
    layer = next(iter(layers.values()))
    needed = lib.load().recipe_page_bytes(settings.recipe, layer.head_size) * layer.num_kv_heads
    for other in windowed:
        sizes = other.attn_backend.get_supported_kernel_block_sizes()
        smallest = min(getattr(size, "base", size) for size in sizes)
        itemsize = other.kv_cache_torch_dtype.itemsize
        token = other.num_kv_heads * (other.head_size + other.head_size_v) * itemsize
        needed = max(needed, smallest * token)
    KakeyaBackend.shared_block_bytes = needed
    vllm_config.cache_config.skip_page_size_padded = needed


def make_codec(model: Any, layers: list[str], vllm_config: Any, settings: Settings) -> Any:
    """The codec of a loaded model, whose attention layers have these names: its shape, its rotary
    angles, and the recipe and artefact of the settings. For a recipe of the seed its PageCodec."""
    if settings.seed is not None:
        from kakeya_vllm.seed.pages import PageCodec

        found = rope.find(model, layers, vllm_config)
        return PageCodec(
            settings.seed, _seed_shape(vllm_config), found, _seed_artefact(vllm_config, settings)
        )
    artefact = config.read_artefact(settings.calibration) if settings.calibration else None
    with _naming(settings):
        return codec_of(model, layers, vllm_config, settings.recipe, artefact)


def codec_of(
    model: Any, layers: list[str], vllm_config: Any, recipe: str, artefact: bytes | None
) -> Any:
    """The same from a recipe (name or JSON) and an artefact's bytes."""
    found = rope.find(model, layers, vllm_config)
    shape = _model_shape(vllm_config) | {"rope": None if found is None else found.to_json()}
    return lib.load().codec(recipe, shape, artefact)


def check_artefact(vllm_config: Any, settings: Settings) -> None:
    """Refuse an artefact that the codec would refuse, before a model is loaded for it.

    Raises ConfigError with the file and the reason. The rotary angles are not known yet and no
    artefact depends on them.
    """
    if settings.seed is not None:
        _seed_artefact(vllm_config, settings)
    elif settings.calibration:
        with _naming(settings):
            artefact = config.read_artefact(settings.calibration)
            lib.load().codec(settings.recipe, _model_shape(vllm_config), artefact)


def _seed_artefact(vllm_config: Any, settings: Settings) -> Any:
    """The artefact of a recipe of the seed, None if it needs none; ConfigError for an unfit one."""
    if settings.calibration is None:
        return None
    from kakeya_vllm.seed import calibration

    fingerprint = config.model_fingerprint(vllm_config.model_config.hf_text_config)
    try:
        return calibration.load(settings.calibration, fingerprint, _seed_shape(vllm_config))
    except calibration.CalibrationError as error:
        raise ConfigError(str(error)) from error


def _seed_shape(vllm_config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and head dimension of the whole model."""
    shape = _model_shape(vllm_config)
    return shape["num_layers"], shape["num_kv_heads"], shape["head_dim"]


@contextlib.contextmanager
def _naming(settings: Settings) -> Iterator[None]:
    """What the codec says of an artefact, with the artefact's path."""
    try:
        yield
    except lib.KakeyaError as error:
        # Another version, while a codec is made, can only be the artefact's.
        about_it = "CALIBRATION" in error.name or error.name == "KAKEYA_ERR_WRONG_VERSION"
        if not settings.calibration or not about_it:
            raise
        raise ConfigError(f"{settings.calibration} cannot be used: {error.text}") from error


def _model_shape(vllm_config: Any) -> dict[str, Any]:
    """The attention shape of the whole model, over all ranks, as kakeya_codec_new takes it."""
    model = vllm_config.model_config
    return {
        "num_layers": model.get_total_num_hidden_layers(),
        "num_kv_heads": model.get_total_num_kv_heads(),
        "num_q_heads": model.model_arch_config.total_num_attention_heads,
        "head_dim": model.get_head_size(),
        # At least as far as this engine goes; the config's own limit otherwise, so that engines
        # with different max_model_len describe the same model.
        "max_position": max(
            int(getattr(model.hf_text_config, "max_position_embeddings", 0) or 0),
            int(model.max_model_len),
        ),
    }


def first_kv_head(vllm_config: Any) -> int:
    """Index in the whole model of this tensor-parallel rank's first KV head.

    With more ranks than KV heads vLLM replicates heads, and neighbouring ranks share one; the
    same division covers both cases.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    total = vllm_config.model_config.get_total_num_kv_heads()
    size = vllm_config.parallel_config.tensor_parallel_size
    return get_tensor_model_parallel_rank() * total // size


def _check_layers(layers: dict[str, Any], shape: dict[str, Any], vllm_config: Any) -> None:
    """Refuse layers that the one shape given to the codec does not describe."""
    size = vllm_config.parallel_config.tensor_parallel_size
    kv_heads = max(1, shape["num_kv_heads"] // size)
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        index = support.layer_index(name)
        if index is None or index >= shape["num_layers"]:
            raise support.UnsupportedFeature(
                [f"attention layers outside the model's {shape['num_layers']} layers"], name
            )
        if index in seen:
            raise support.UnsupportedFeature(
                [f"several attention modules in layer {index} ({seen[index]})"], name
            )
        seen[index] = name
        if (layer.num_kv_heads, layer.head_size) != (kv_heads, shape["head_dim"]):
            raise support.UnsupportedFeature(["layers with differing heads"], name)
