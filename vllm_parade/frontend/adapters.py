# SPDX-License-Identifier: Apache-2.0
"""Which adapters the workers hold, and how a new one gets there: before its first request is, never inside a step."""

import asyncio
import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_parade.config import ServingConfig
from vllm_parade.request import ParadeRequest

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

logger = init_logger("vllm.parade.adapters")

AdapterKey = tuple[str, str]


@lru_cache(maxsize=64)
def _position(function: Callable[..., Any], name: str) -> int:
    # The first parameter is self, which the arguments of a wrapped method lack.
    return list(inspect.signature(function).parameters).index(name) - 1


def argument(wrapped: Any, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """Value of a wrapped method's argument, however it was passed; None where it was not."""
    if name in kwargs:
        return kwargs[name]
    position = _position(wrapped.__func__, name)
    return args[position] if position < len(args) else None


def with_argument(
    wrapped: Any, args: tuple, kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a wrapped method with another value for `name`, however it was passed."""
    position = _position(wrapped.__func__, name)
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


class AdapterRegistry:
    """What the front end knows of the adapters in the workers' host memory.

    The front end decides what is read and what makes room for it, so that all workers do the same. Whatever
    makes room is forgotten only when all of them have read the new one. Adapters of requests that may still run are
    never evicted.
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.lock = asyncio.Lock()
        self._hashes: OrderedDict[AdapterKey, str] = OrderedDict()
        self._in_use: set[AdapterKey] = set()
        # Content hashes of what workers hold in vain, until they have been told.
        self.stale: set[str] = set()
        # Requests that have their adapter and that the engine does not count as unfinished yet.
        self.arriving = 0
        self._pinned: set[AdapterKey] = set()

    @classmethod
    def of(cls, input_processor: "InputProcessor") -> "AdapterRegistry":
        """The registry of an engine, which lives on its input processor."""
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
        """Content hash of a resident adapter."""
        key = _key(request)
        if key not in self._hashes:
            raise VLLMValidationError(f"adapter {request.parade_name!r} ({request.parade_path}) is not loaded")
        return self._hashes[key]

    def use(self, request: ParadeRequest, *, engine_is_idle: bool) -> bool:
        """Mark an adapter as used if it is resident; returns whether it is."""
        if engine_is_idle and not self.arriving:
            self._in_use.clear()
        key = _key(request)
        if key in self._hashes:
            self._in_use.add(key)
            self._hashes.move_to_end(key)
            return True
        return False

    def make_room(self) -> list[AdapterKey]:
        """Adapters to evict so that one more fits, least recently used first.

        Raises:
            VLLMValidationError: every resident adapter may still have running requests.
        """
        excess = len(self._hashes) + 1 - self.config.host_capacity
        idle = [key for key in self._hashes if key not in self._in_use and key not in self._pinned]
        if excess > len(idle):
            raise VLLMValidationError(
                f"all {len(self._hashes)} adapters in host memory are in use; raise --max-cpu-parades "
                f"(max_cpu_parades), now {self.config.host_capacity}"
            )
        return idle[: max(excess, 0)]

    def commit(self, request: ParadeRequest, evicted: list[AdapterKey], answers: list[dict[str, Any]]) -> None:
        """Take note of what the workers answered to a load; the adapter is then in use.

        Raises:
            VLLMValidationError: the adapter cannot be used; nothing has changed.
        """
        held = {answer["content_hash"] for answer in answers if answer["ok"]}
        errors = [answer["error"] for answer in answers if not answer["ok"]]
        if not errors and len(held) > 1:
            errors = [f"workers read different files in {request.path}"]
        if errors:
            self._note_stale(held)
            raise VLLMValidationError(f"adapter {request.parade_name!r}: {errors[0]}")
        left = {self._hashes.pop(key) for key in evicted}
        self._hashes[_key(request)] = held.pop()
        self._note_stale(left)
        self._in_use.add(_key(request))
        logger.info("Loaded PARADE adapter %r from %s", request.parade_name, request.parade_path)

    def _note_stale(self, content_hashes: set[str]) -> None:
        # The same content may be resident under another name.
        self.stale = (self.stale | content_hashes) - set(self._hashes.values())

    def pin(self, request: ParadeRequest) -> None:
        """Keep an adapter until it is unpinned."""
        self._pinned.add(_key(request))

    def unpin(self, request: ParadeRequest) -> None:
        """Let an adapter make room for others when its requests have ended; one that is not pinned stays as it is."""
        self._pinned.discard(_key(request))


def _key(request: ParadeRequest) -> AdapterKey:
    return request.parade_name, request.parade_path


def add_request(wrapped: Callable[..., Any], instance: "LLMEngine", args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wraps LLMEngine.add_request: load the request's adapter first."""
    request = argument(wrapped, args, kwargs, "lora_request")
    if isinstance(request, ParadeRequest):
        registry = AdapterRegistry.of(instance.input_processor)
        if not registry.use(request, engine_is_idle=not instance.has_unfinished_requests()):
            evicted = registry.make_room()
            answers = instance.collective_rpc("parade_add", args=(request.parade_path,))
            try:
                registry.commit(request, evicted, answers)
            finally:
                if registry.stale:
                    instance.collective_rpc("parade_forget", args=(sorted(registry.stale),))
                    registry.stale.clear()
    return wrapped(*args, **kwargs)


async def load_adapter(engine: "AsyncLLM", request: ParadeRequest) -> None:
    """Make sure that the workers hold an adapter.

    Raises:
        VLLMValidationError: it cannot be used; what was loaded before stays.
    """
    registry = AdapterRegistry.of(engine.input_processor)
    async with registry.lock:
        if registry.use(request, engine_is_idle=not engine.output_processor.has_unfinished_requests()):
            return
        evicted = registry.make_room()
        answers = await engine.collective_rpc("parade_add", args=(request.parade_path,))
        try:
            registry.commit(request, evicted, answers)
        finally:
            if registry.stale:
                await engine.collective_rpc("parade_forget", args=(sorted(registry.stale),))
                registry.stale.clear()


async def add_request_async(
    wrapped: Callable[..., Any], instance: "AsyncLLM", args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Wraps AsyncLLM.add_request: load the request's adapter first."""
    request = argument(wrapped, args, kwargs, "lora_request")
    if not isinstance(request, ParadeRequest):
        return await wrapped(*args, **kwargs)
    await load_adapter(instance, request)
    registry = AdapterRegistry.of(instance.input_processor)
    registry.arriving += 1
    try:
        return await wrapped(*args, **kwargs)
    finally:
        registry.arriving -= 1
