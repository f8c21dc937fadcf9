# SPDX-License-Identifier: Apache-2.0
"""Requests of the offline engine, `LLMEngine`: load the adapter first, or hold the request until it fits.

`LLM.generate` adds all its requests before the engine's first step. If they use more adapters than fit into host
memory, the requests without room are held here. They are not in the engine yet, but count as unfinished.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_parade.adapter import AdapterError, BaseModelShape, load_adapter
from vllm_parade.frontend.adapters import AdapterKey, AdapterRegistry, key_of, run
from vllm_parade.frontend.signatures import argument
from vllm_parade.request import ParadeRequest

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True)
class Call:
    """A pending call of LLMEngine.add_request."""

    wrapped: Callable[..., str]
    args: tuple
    kwargs: dict[str, Any]

    def argument(self, name: str) -> Any:
        """An argument of the call. None if the caller left it out."""
        return argument(self.wrapped, self.args, self.kwargs, name)


class HeldRequests:
    """An engine's requests with adapters: those in the engine, and those held until their adapter fits."""

    def __init__(self, engine: "LLMEngine") -> None:
        self.engine = engine
        self.registry = AdapterRegistry.of(engine.input_processor)
        self.running: dict[str, AdapterKey] = {}
        self.held: deque[Call] = deque()
        # Number of unfinished requests after the last attempt. Until one of them ends, no held request fits.
        self.unfinished_when_full = 0

    def add(self, call: Call) -> str:
        """Add a request to the engine, or hold it. Returns the request id.

        Raises:
            VLLMValidationError: the adapter cannot be used.
        """
        if not self.held:
            self._update_in_use()
        request_id = self._start(call)
        if request_id is None:
            self._check(call.argument("lora_request"))
            self.held.append(call)
        return request_id or call.argument("request_id")

    def release(self) -> None:
        """Add the held requests whose adapters fit now.

        Raises:
            VLLMValidationError: an adapter has changed on disk since its request was held. All requests are aborted,
                so that no later call gets answers of this one.
        """
        unfinished = self.engine.output_processor.external_req_ids
        if unfinished and len(unfinished) == self.unfinished_when_full:
            return
        self._update_in_use()
        waiting, self.held = self.held, deque()
        try:
            for call in waiting:
                if self._start(call) is None:
                    self.held.append(call)
        except VLLMValidationError:
            self.held.clear()
            self.engine.abort_request(list(unfinished))
            raise
        self.unfinished_when_full = len(unfinished)

    def _start(self, call: Call) -> str | None:
        """Add a request to the engine. None if its adapter does not fit, or if requests held earlier still wait."""
        request = call.argument("lora_request")
        if not self.registry.use(request):
            if self.held or not self.registry.has_room():
                return None
            run(self.registry.load(request), self.engine.collective_rpc)
        request_id = call.wrapped(*call.args, **call.kwargs)
        self.running[call.argument("request_id")] = key_of(request)
        return request_id

    def drop(self, request_ids: Sequence[str]) -> None:
        """Remove held requests."""
        self.held = deque(call for call in self.held if call.argument("request_id") not in request_ids)

    @property
    def num_held(self) -> int:
        """Number of held requests as vLLM counts them: `n` per request."""
        return sum(getattr(call.argument("params"), "n", 1) for call in self.held)

    def _update_in_use(self) -> None:
        unfinished = self.engine.output_processor.external_req_ids
        self.running = {name: key for name, key in self.running.items() if name in unfinished}
        self.registry.keep_in_use(set(self.running.values()))

    def _check(self, request: ParadeRequest) -> None:
        """Refuse a bad adapter when its request is added, not when the request is released."""
        config = self.registry.config
        shape = BaseModelShape.from_hf_config(self.engine.vllm_config.model_config.hf_text_config)
        try:
            load_adapter(request.path, shape, max_rank=config.max_parade_rank, sites=config.sites)
        except AdapterError as error:
            raise VLLMValidationError(f"adapter {request.parade_name!r}: {error}") from None


def _requests(engine: "LLMEngine") -> HeldRequests | None:
    """The engine's held requests. None before its first request with an adapter."""
    return getattr(engine, "parade_requests", None)


def add_request(wrapped: Callable[..., str], instance: "LLMEngine", args: tuple, kwargs: dict[str, Any]) -> str:
    """Wraps LLMEngine.add_request: load the request's adapter first, or hold the request until it fits."""
    call = Call(wrapped, args, kwargs)
    if not isinstance(call.argument("lora_request"), ParadeRequest):
        return wrapped(*args, **kwargs)
    requests = _requests(instance)
    if requests is None:
        requests = instance.parade_requests = HeldRequests(instance)
    return requests.add(call)


def step(wrapped: Callable[..., Any], instance: "LLMEngine", args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wraps LLMEngine.step: first add the held requests whose adapters fit now."""
    requests = _requests(instance)
    if requests is not None and requests.held:
        requests.release()
    return wrapped(*args, **kwargs)


def has_unfinished_requests(
    wrapped: Callable[..., bool], instance: "LLMEngine", args: tuple, kwargs: dict[str, Any]
) -> bool:
    """Wraps LLMEngine.has_unfinished_requests: count held requests as unfinished."""
    requests = _requests(instance)
    return wrapped(*args, **kwargs) or (requests is not None and bool(requests.held))


def get_num_unfinished_requests(
    wrapped: Callable[..., int], instance: "LLMEngine", args: tuple, kwargs: dict[str, Any]
) -> int:
    """Wraps LLMEngine.get_num_unfinished_requests: count held requests as unfinished."""
    requests = _requests(instance)
    return wrapped(*args, **kwargs) + (0 if requests is None else requests.num_held)


def abort_request(wrapped: Callable[..., None], instance: "LLMEngine", args: tuple, kwargs: dict[str, Any]) -> None:
    """Wraps LLMEngine.abort_request: remove held requests too."""
    requests = _requests(instance)
    if requests is not None and requests.held:
        requests.drop(argument(wrapped, args, kwargs, "request_ids"))
    return wrapped(*args, **kwargs)
