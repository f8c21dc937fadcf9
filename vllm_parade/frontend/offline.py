# SPDX-License-Identifier: Apache-2.0
"""`parade_request=` for LLM.generate, enqueue, chat and beam_search."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_parade.frontend.signatures import argument
from vllm_parade.request import ParadeRequest

KEYWORD = "parade_request"


def generate(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wraps LLM.generate, enqueue and chat: pass `parade_request` on as `lora_request`."""
    return _called(wrapped, args, _with_adapter(wrapped, args, kwargs))


def beam_search(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wraps LLM.beam_search: as `generate`. All steps of a prompt use the instruction of its first step."""
    if kwargs.get(KEYWORD) is None:
        return generate(wrapped, instance, args, kwargs)
    kwargs = _with_adapter(wrapped, args, kwargs)
    prompts = argument(wrapped, args, kwargs, "prompts")
    given = kwargs["lora_request"]
    requests = given if isinstance(given, Sequence) else [given] * len(prompts)
    kwargs["lora_request"] = [request and request.for_beam_search() for request in requests]
    return _called(wrapped, args, kwargs)


def _called(wrapped: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call the wrapped method. In its errors about adapters, replace `lora_request` by `parade_request`."""
    try:
        return wrapped(*args, **kwargs)
    except VLLMValidationError as error:
        given = kwargs.get("lora_request")
        ours = isinstance(given, Sequence) and any(isinstance(request, ParadeRequest) for request in given)
        if ours and "lora_request" in str(error):
            raise VLLMValidationError(str(error).replace("lora_request", KEYWORD)) from None
        raise


def _with_adapter(wrapped: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if KEYWORD not in kwargs:
        return kwargs
    kwargs = dict(kwargs)
    given = kwargs.pop(KEYWORD)
    if given is None:
        return kwargs
    for request in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
        if request is not None and not isinstance(request, ParadeRequest):
            raise TypeError(f"parade_request is {request!r}; expected a ParadeRequest, or a list of them and None")
    if argument(wrapped, args, kwargs, "lora_request") is not None:
        raise ValueError("lora_request and parade_request cannot be given together; give one of them")
    return {**kwargs, "lora_request": given}
