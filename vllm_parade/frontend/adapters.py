# SPDX-License-Identifier: Apache-2.0
"""The adapters in the workers' host memory, and loading an adapter before its first request runs."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_parade.adapter.turns import TurnMarkers
from vllm_parade.config import ServingConfig
from vllm_parade.request import ParadeRequest

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

logger = init_logger("vllm.parade.adapters")

AdapterKey = tuple[str, str]
# Yields a worker method and its arguments; receives the answers of all workers.
RemoteCalls = Generator[tuple[str, tuple[Any, ...]], list[Any], None]


class AdapterRegistry:
    """The front end's record of the adapters in the workers' host memory.

    The front end decides which adapters are loaded and evicted, so all workers hold the same ones. Workers free an
    evicted adapter only after all of them have read the new one. Adapters of unfinished requests are never evicted.
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.capacity = config.max_cpu_parades or config.least_cpu_parades
        """Maximum number of adapters in host memory."""
        self.lock = asyncio.Lock()
        """Held during a load, so that loads run one at a time."""
        self.loads: set[asyncio.Task[None]] = set()
        """Running loads. asyncio keeps only weak references to tasks."""
        self.stale: set[str] = set()
        """Content hashes that no request can use and that workers may still hold; freed by parade_forget."""
        self.arriving = 0
        """Number of requests with a loaded adapter that the engine does not yet count as unfinished."""
        self._hashes: OrderedDict[AdapterKey, str] = OrderedDict()
        self._markers: dict[str, TurnMarkers] = {}
        self._in_use: set[AdapterKey] = set()
        self._pinned: set[AdapterKey] = set()

    @classmethod
    def of(cls, input_processor: "InputProcessor") -> "AdapterRegistry":
        """The registry of an engine. It is stored on the input processor and created on first use.

        Raises:
            VLLMValidationError: PARADE is not enabled.
        """
        registry = getattr(input_processor, "parade_registry", None)
        if registry is None:
            config = ServingConfig.from_vllm_config(input_processor.vllm_config)
            if not config.enable_parade:
                raise VLLMValidationError(
                    "got a ParadeRequest, but PARADE is not enabled; start the engine with enable_parade=True "
                    "(--enable-parade)"
                )
            registry = input_processor.parade_registry = cls(config)
        return registry

    def content_hash(self, request: ParadeRequest) -> str:
        """Content hash of a resident adapter.

        Raises:
            VLLMValidationError: the adapter is not resident.
        """
        key = key_of(request)
        if key not in self._hashes:
            raise VLLMValidationError(f"adapter {request.parade_name!r} ({request.parade_path}) is not loaded")
        return self._hashes[key]

    def turn_markers(self, content_hash: str) -> TurnMarkers | None:
        """How a resident adapter marks its instructions. None if a whole prompt is its instruction."""
        return self._markers.get(content_hash)

    def keep_in_use(self, keys: Collection[AdapterKey]) -> None:
        """Mark these adapters, and no others, as used by unfinished requests."""
        self._in_use = self._hashes.keys() & keys

    def use(self, request: ParadeRequest) -> bool:
        """Mark an adapter as in use if it is resident. Returns whether it is resident."""
        key = key_of(request)
        if key in self._hashes:
            self._in_use.add(key)
            self._hashes.move_to_end(key)
            return True
        return False

    def has_room(self) -> bool:
        """Whether one more adapter fits, possibly after evicting one that is neither in use nor pinned."""
        return self._num_excess() <= len(self._evictable())

    def load(self, request: ParadeRequest) -> RemoteCalls:
        """Yield the remote calls that load an adapter; then mark it as resident and in use.

        Raises:
            VLLMValidationError: there is no room, or a worker cannot use the adapter. The resident adapters stay.
        """
        if not self.has_room():
            raise VLLMValidationError(
                f"all {len(self._hashes)} adapters in host memory are in use; raise --max-cpu-parades "
                f"(max_cpu_parades), now {self.capacity}"
            )
        evicted = self._evictable()[: max(self._num_excess(), 0)]
        answers = yield "parade_add", (request.parade_path,)
        try:
            self._commit(request, evicted, answers)
        finally:
            if self.stale:
                yield "parade_forget", (sorted(self.stale),)
                self.stale.clear()

    def pin(self, request: ParadeRequest) -> None:
        """Exclude an adapter from eviction until it is unpinned."""
        self._pinned.add(key_of(request))

    def unpin(self, request: ParadeRequest) -> None:
        """Allow eviction of an adapter once its requests have ended. Does nothing if it is not pinned."""
        self._pinned.discard(key_of(request))

    def _num_excess(self) -> int:
        return len(self._hashes) + 1 - self.capacity

    def _evictable(self) -> list[AdapterKey]:
        """Adapters that may be evicted, least recently used first."""
        return [key for key in self._hashes if key not in self._in_use and key not in self._pinned]

    def _commit(self, request: ParadeRequest, evicted: list[AdapterKey], answers: list[dict[str, Any]]) -> None:
        held = {answer["content_hash"] for answer in answers if answer["ok"]}
        errors = [answer["error"] for answer in answers if not answer["ok"]]
        if not errors and len(held) > 1:
            errors = [f"workers read different files in {request.path}"]
        if errors:
            self._note_stale(held)
            raise VLLMValidationError(f"adapter {request.parade_name!r}: {errors[0]}")
        left = {self._hashes.pop(key) for key in evicted}
        content_hash = self._hashes[key_of(request)] = held.pop()
        if markers := answers[0].get("turn_markers"):
            start, end, most = markers
            self._markers[content_hash] = TurnMarkers(tuple(start), tuple(end), most)
        self._note_stale(left)
        self._in_use.add(key_of(request))
        logger.info("Loaded PARADE adapter %r from %s", request.parade_name, request.parade_path)

    def _note_stale(self, content_hashes: set[str]) -> None:
        # The same content may be resident under another name.
        self.stale = (self.stale | content_hashes) - set(self._hashes.values())
        for content_hash in self.stale:
            self._markers.pop(content_hash, None)


def key_of(request: ParadeRequest) -> AdapterKey:
    """Key of a request's adapter: name and path."""
    return request.parade_name, request.parade_path


def run(calls: RemoteCalls, collective_rpc: Callable[..., list[Any]]) -> None:
    """Make the remote calls one after the other."""
    method, args = next(calls)
    try:
        while True:
            method, args = calls.send(collective_rpc(method, args=args))
    except StopIteration:
        return


async def ensure_loaded(engine: "AsyncLLM", request: ParadeRequest) -> None:
    """Load an adapter on the workers if it is not resident, and mark it as in use.

    If the client disconnects, the load continues. A cancelled load could leave an adapter in the workers that the
    registry does not know.

    Raises:
        VLLMValidationError: there is no room, or a worker cannot use the adapter. The resident adapters stay.
    """
    registry = AdapterRegistry.of(engine.input_processor)
    load = asyncio.ensure_future(_load(engine, registry, request))
    registry.loads.add(load)
    load.add_done_callback(registry.loads.discard)
    await asyncio.shield(load)


async def _load(engine: "AsyncLLM", registry: AdapterRegistry, request: ParadeRequest) -> None:
    async with registry.lock:
        if not engine.output_processor.has_unfinished_requests() and not registry.arriving:
            registry.keep_in_use(())
        if registry.use(request):
            return
        calls = registry.load(request)
        method, args = next(calls)
        try:
            while True:
                method, args = calls.send(await engine.collective_rpc(method, args=args))
        except StopIteration:
            return
