"""KV connectors: sealed pages that leave the engine and come back.

``KakeyaConnector`` keeps full blocks in a folder (page_folder.py), for other engines or for this
one. ``KakeyaOffloadingConnector`` is vLLM's own OffloadingConnector, which copies pages to CPU
memory, with one bound.

Only full blocks travel. vLLM hashes no other, a full block is sealed in the step that fills it,
and its page is all that a reader needs: no entry of the open-block table, no flag beside it. What
follows for a load: it ends at a block boundary, and it leaves at least one token of the request to
compute, which then begins a block of its own. (vLLM would load a prompt of whole blocks entirely
and compute its last token again, inside a block whose raw tokens no longer exist.)
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger

from kakeya_vllm import runtime, support
from kakeya_vllm.lib import BLOCK_TOKENS
from kakeya_vllm.page_folder import PageFolder, UnusablePage, identity

logger = init_logger("vllm.kakeya")

# Threads that read and write files; hashing and file system calls let go of the interpreter.
THREADS = 4
# Blocks whose pages wait in memory to be written. A step that has more waits for the oldest.
MAX_WAITING = 256

Blocks = list[tuple[int, bytes]]  # block id, vLLM's hash of the block


def loadable_blocks(num_tokens: int) -> int:
    """Leading blocks of a request that may be loaded: full ones, with a token left to compute."""
    return (num_tokens - 1) // BLOCK_TOKENS


class KakeyaOffloadingConnector(OffloadingConnector):
    """vLLM's OffloadingConnector, which never loads a whole request."""

    def _max_loadable_tokens(self, request: Any, num_computed_tokens: int) -> int:
        bound = super()._max_loadable_tokens(request, num_computed_tokens)
        mine = max(0, loadable_blocks(request.num_tokens) * BLOCK_TOKENS - num_computed_tokens)
        return mine if bound is None else min(bound, mine)


@dataclass
class Transfers(KVConnectorMetadata):
    """What the workers do in a step: blocks to load by request, blocks to keep."""

    loads: dict[str, Blocks] = field(default_factory=dict)
    stores: Blocks = field(default_factory=list)


class KakeyaConnector(KVConnectorBase_V1, SupportsHMA):
    """Pages in a folder. As ``kv_producer`` it only writes, and a step ends when its pages are
    written; as ``kv_consumer`` it only reads; as ``kv_both`` it reads, and writes beside the steps.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        model = vllm_config.model_config
        extra = transfer.kv_connector_extra_config
        heads = model.get_total_num_kv_heads()
        about = identity(vllm_config, str(extra.get("model", model.model)))
        folder = PageFolder(Path(extra["folder"]).expanduser(), about, heads)
        self._plan: _Plan | None = None
        self._mover: _Mover | None = None
        if role == KVConnectorRole.SCHEDULER:
            folder.prepare(write=transfer.is_kv_producer)
            logger.info("KAKEYA pages are kept in %s", folder.directory)
            self._plan = _Plan(folder, transfer.is_kv_consumer, transfer.is_kv_producer)
        else:
            wait = not transfer.is_kv_consumer
            self._mover = _Mover(folder, vllm_config, kv_cache_config, wait=wait)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # what was not kept is computed again

    # ---- in the scheduler -------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        count = self._plan.matched(request, num_computed_tokens)
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._plan.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        return self._plan.step(scheduler_output, self._kv_cache_manager)

    def update_connector_output(self, connector_output: Any) -> None:
        self._plan.finished(
            connector_output.finished_recving or (), connector_output.invalid_block_ids or ()
        )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._plan.forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # ---- in a worker ------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._mover.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._mover.load(self._get_connector_metadata().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no step reads blocks that are still being loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: pages are kept when the step is over and all layers are sealed."""

    def wait_for_save(self) -> None:
        self._mover.store(self._get_connector_metadata().stores)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._mover.finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._mover.take_failed()

    def shutdown(self) -> None:
        if self._mover is not None:
            self._mover.shutdown()


class _Plan:
    """The scheduler's side: which blocks are in the folder, which go there."""

    def __init__(self, folder: PageFolder, reads: bool, writes: bool) -> None:
        self._folder = folder
        self._reads = reads
        self._writes = writes
        self._requests: dict[str, Any] = {}
        self._kept: dict[str, int] = {}  # leading blocks of a request that need not be kept again
        self._first: dict[str, int] = {}  # the first block of a request that would be loaded
        self._new_loads: dict[str, Blocks] = {}
        self._loading: dict[str, Blocks] = {}
        self._failed: set[int] = set()  # block ids that a worker could not load
        self._unusable: set[bytes] = set()  # not to be asked for again, should the file remain

    def matched(self, request: Any, computed: int) -> int:
        """Tokens of a request beyond ``computed`` that the folder has."""
        first = block = computed // BLOCK_TOKENS
        hashes = request.block_hashes
        end = min(loadable_blocks(request.num_tokens), len(hashes)) if self._reads else first
        while block < end and hashes[block] not in self._unusable:
            if not self._folder.has(hashes[block]):
                break
            block += 1
        self._first[request.request_id] = first
        return (block - first) * BLOCK_TOKENS

    def allocated(self, request: Any, block_ids: list[int], external: int) -> None:
        """Block ids of a request that will be scheduled, or whose ``external`` tokens found by
        :meth:`matched` are to be loaded first."""
        name = request.request_id
        self._requests[name] = request
        if external:
            first = self._first[name]
            self._new_loads[name] = [
                (block_ids[i], request.block_hashes[i])
                for i in range(first, first + external // BLOCK_TOKENS)
            ]

    def step(self, scheduler_output: Any, manager: Any) -> Transfers:
        transfers = Transfers(loads=self._new_loads)
        self._loading |= self._new_loads
        self._new_loads = {}
        for name, count in scheduler_output.num_scheduled_tokens.items() if self._writes else ():
            request = self._requests[name]
            # Drafts are not among a request's tokens, so only what is true for good is kept.
            tokens = min(request.num_computed_tokens + count, request.num_tokens)
            full = min(tokens // BLOCK_TOKENS, len(request.block_hashes))
            kept = self._kept.get(name, 0)
            if full > kept:
                ids = manager.get_block_ids(name)[0]
                new = [(ids[i], request.block_hashes[i]) for i in range(kept, full)]
                missing = [(i, block) for i, block in new if not self._folder.has(block)]
                transfers.stores += missing
                self._unusable.difference_update(block for _, block in missing)
                self._kept[name] = full
        return transfers

    def finished(self, requests: Any, failed: Any) -> None:
        """Loads that are over; the blocks of ``failed`` did not arrive."""
        self._failed |= set(failed)
        for name in requests:
            blocks = self._loading.pop(name)
            self._unusable |= {block for i, block in blocks if i in self._failed}
            self._failed -= {i for i, _ in blocks}

    def forget(self, name: str) -> None:
        self._requests.pop(name, None)
        self._kept.pop(name, None)
        self._first.pop(name, None)


class _Mover:
    """A worker's side: between the KV cache and the files of its KV heads.

    ``wait``: whether a step waits until its pages are written.
    """

    def __init__(
        self, folder: PageFolder, vllm_config: Any, kv_cache_config: Any, *, wait: bool
    ) -> None:
        self._folder = folder
        self._config = vllm_config
        self._num_blocks = kv_cache_config.num_blocks
        self._wait = wait
        self._threads = ThreadPoolExecutor(THREADS, "kakeya-pages")
        self._caches: list[torch.Tensor] = []  # [blocks, heads, ...] by layer
        self._sizes: list[int] = []  # bytes of a layer's block and head
        self._heads = range(0)
        self._tables = ""
        self._loads: dict[str, tuple[Blocks, list[Future]]] = {}
        self._writes: deque[Future] = deque()
        self._failed: set[int] = set()
        self._warned = False

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the caches of all layers, logical [blocks, heads, states, content]."""
        context = self._config.compilation_config.static_forward_context
        names = sorted(kv_caches, key=support.layer_index)
        self._caches = [kv_caches[name] for name in names]
        self._sizes = [cache[0, 0].numel() * cache.element_size() for cache in self._caches]
        counts = {tuple(cache.shape[:2]) for cache in self._caches}
        if len(counts) != 1 or counts.pop()[0] != self._num_blocks:
            raise support.UnsupportedFeature(
                ["KakeyaConnector with layers whose blocks or heads differ in number"]
            )
        first = runtime.first_kv_head(self._config)
        self._heads = range(first, first + self._caches[0].shape[1])
        codecs = [getattr(context[name].impl, "runtime", None) for name in names]
        sealed_by = next((found.codec for found in codecs if found is not None), None)
        self._tables = sealed_by.describe()["fingerprint"] if sealed_by is not None else ""

    def store(self, blocks: Blocks) -> None:
        """Keep blocks. What they hold is copied before this returns."""
        if blocks:
            ids = torch.tensor([block_id for block_id, _ in blocks])
            rows = torch.cat([self._rows(cache, ids) for cache in self._caches], dim=2)
            for (_, block), pages in zip(blocks, rows, strict=True):
                self._writes.append(self._threads.submit(self._write, block, pages))
        while len(self._writes) > (0 if self._wait else MAX_WAITING):
            self._writes.popleft().result()

    @staticmethod
    def _rows(cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """uint8 [ids, heads, bytes] on the CPU. On a GPU this waits for the step."""
        return cache[ids.to(cache.device)].flatten(2).contiguous().view(torch.uint8).cpu()

    def _write(self, block: bytes, pages: torch.Tensor) -> None:
        try:
            for head, mine in zip(self._heads, pages, strict=True):
                self._folder.write(block, head, mine, self._tables)
        except OSError as error:
            # A page that is not kept is computed again: the engine goes on.
            if not self._warned:
                logger.warning("KAKEYA pages cannot be kept: %s. Going on without", error)
            self._warned = True

    def load(self, requests: dict[str, Blocks]) -> None:
        """Begin to read the files of blocks."""
        for name, blocks in requests.items():
            futures = [self._threads.submit(self._read, block) for _, block in blocks]
            self._loads[name] = blocks, futures

    def _read(self, block: bytes) -> torch.Tensor:
        size = sum(self._sizes)
        pages = [self._folder.read(block, head, size, self._tables) for head in self._heads]
        return torch.stack(pages)

    def finished(self) -> set[str]:
        """Requests whose blocks have arrived; those that could not be read are failed ones."""
        over = {
            name
            for name, (_, futures) in self._loads.items()
            if all(future.done() for future in futures)
        }
        for name in over:
            blocks, futures = self._loads.pop(name)
            ids, pages = [], []
            for (block_id, _), future in zip(blocks, futures, strict=True):
                try:
                    pages.append(future.result())
                    ids.append(block_id)
                except UnusablePage as error:
                    logger.warning("KAKEYA: %s", error)
                    self._failed.add(block_id)
            if ids:
                self._put(ids, torch.stack(pages))
        return over

    def _put(self, block_ids: list[int], pages: torch.Tensor) -> None:
        """Pages uint8 [blocks, heads, bytes] into the caches. On a GPU in the order of the stream,
        so before the step that reads them."""
        for cache, mine in zip(self._caches, pages.split(self._sizes, dim=2), strict=True):
            ids = torch.tensor(block_ids, device=cache.device)
            shape = (len(block_ids), *cache.shape[1:])
            cache[ids] = mine.contiguous().to(cache.device).view(cache.dtype).view(shape)

    def take_failed(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        self._threads.shutdown(wait=True)
