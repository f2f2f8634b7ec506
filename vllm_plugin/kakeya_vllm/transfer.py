"""Which KV connectors KAKEYA runs with, and what of their settings.

A connector copies what lies in the KV cache of a block and says which request finds it there. That
suits pages, but each connector has its own idea of what a block looks like inside, of the names
under which it keeps one, and of where a load may end. So only those run that were looked at: see
connector.py. Everything else is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "KakeyaConnector"
OFFLOADING = "KakeyaOffloadingConnector"
MODULE = "kakeya_vllm.connector"

_VLLM_OFFLOADING = "OffloadingConnector"
_SETTINGS = {"folder", "model"}
# Of vLLM's OffloadingConnector: what is kept where, and how blocks are put together.
_OFFLOADING_SPEC = "CPUOffloadingSpec"


def register(module: Any) -> None:
    """Make the connectors known by name. ``module``: vLLM's connector factory."""
    factory = module.KVConnectorFactory
    for name in (FOLDER, OFFLOADING):
        if name not in factory._registry:
            factory.register_connector(name, MODULE, name)


def features(vllm_config: Any, *, seed: bool, mixed: str) -> list[str]:
    """What is not supported of an engine's KV connector. ``seed``: with a recipe of the seed;
    ``mixed``: what to call a model whose layers differ in what they keep, empty for any other."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return []
    name = transfer.kv_connector
    found = []
    if seed:
        found.append("KV connectors with a recipe of the seed")
    if mixed:
        # Blocks of several groups: a load would have to bring all of them, or none.
        found.append(f"KV connectors with {mixed}")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        found.append("KV connectors with pipeline parallelism")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
        found.append(f"KV connectors with drafts by {speculative.method}")
    if name == FOLDER:
        found += _folder_features(vllm_config)
    elif name in (_VLLM_OFFLOADING, OFFLOADING):
        found += _offloading_features(transfer.kv_connector_extra_config)
    else:
        found.append(
            f"the KV connector {name} (valid: {FOLDER}, and on a GPU {_VLLM_OFFLOADING}; what "
            "others do with pages was not tried)"
        )
    return found


def _folder_features(vllm_config: Any) -> list[str]:
    transfer = vllm_config.kv_transfer_config
    extra = transfer.kv_connector_extra_config
    found = []
    folder = extra.get("folder")
    if not isinstance(folder, str) or not Path(folder).expanduser().is_absolute():
        found.append(
            f"{FOLDER} with folder {folder!r} in kv_connector_extra_config (valid: an absolute "
            "path)"
        )
    if not isinstance(extra.get("model", ""), str):
        found.append(f"{FOLDER} with model {extra['model']!r} (valid: a name for the weights)")
    unknown = sorted(set(extra) - _SETTINGS)
    if unknown:
        found.append(
            f"{FOLDER} with {', '.join(unknown)} in kv_connector_extra_config (valid: "
            f"{', '.join(sorted(_SETTINGS))})"
        )
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256"):
        # Others are seeded per process and collide when somebody wants them to.
        found.append(
            f"{FOLDER} with prefix_caching_hash_algo {algorithm} (valid: sha256, sha256_cbor)"
        )
    return found


def _offloading_features(extra: dict[str, Any]) -> list[str]:
    from vllm.platforms import current_platform

    found = []
    if current_platform.is_cpu():
        found.append(
            f"KV offloading without a GPU (vLLM's {_VLLM_OFFLOADING} needs one; {FOLDER} with a "
            "folder in /dev/shm keeps pages in memory)"
        )
    spec = extra.get("spec_name", _OFFLOADING_SPEC)
    if spec != _OFFLOADING_SPEC:
        # Names of its tiers' files hold no recipe, and nothing says that a file is whole.
        found.append(f"KV offloading with {spec} (valid: {_OFFLOADING_SPEC}; for files {FOLDER})")
    if extra.get("canonical_layout"):
        found.append("KV offloading with canonical_layout")
    return found


def adopt(vllm_config: Any) -> None:
    """Put the bounded connector in the place of vLLM's OffloadingConnector."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector == _VLLM_OFFLOADING:
        transfer.kv_connector = OFFLOADING
