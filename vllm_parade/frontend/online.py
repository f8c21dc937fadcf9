# SPDX-License-Identifier: Apache-2.0
"""Adapters in the OpenAI-compatible server and in its engine, `AsyncLLM`."""

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from vllm_parade.config import ServingConfig
from vllm_parade.frontend.adapters import AdapterRegistry, ensure_loaded
from vllm_parade.frontend.signatures import argument
from vllm_parade.request import ParadeRequest

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM


async def init_static_loras(
    wrapped: Callable[..., Any], instance: "OpenAIServingModels", args: tuple, kwargs: dict[str, Any]
) -> None:
    """Wraps OpenAIServingModels.init_static_loras: load --parade-modules and add them to `lora_requests`.

    /v1/models, the check of a request's model (404 for unknown names), chat, completions and beam search read this map.
    """
    await wrapped(*args, **kwargs)
    engine = instance.engine_client
    for module in ServingConfig.from_vllm_config(engine.vllm_config).parade_modules:
        request = ParadeRequest(module.name, module.path, base_model_name=module.base_model_name)
        await ensure_loaded(engine, request)
        AdapterRegistry.of(engine.input_processor).pin(request)
        instance.lora_requests[module.name] = request


async def beam_search(
    wrapped: Callable[..., AsyncGenerator[Any, None]], instance: Any, args: tuple, kwargs: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    """Wraps BeamSearchOnlineMixin.beam_search: all steps use the instruction of the first step."""
    request = argument(wrapped, args, kwargs, "lora_request")
    if isinstance(request, ParadeRequest):
        if "lora_request" not in kwargs:
            raise TypeError("beam_search takes lora_request by keyword")
        kwargs = {**kwargs, "lora_request": request.for_beam_search()}
    async for output in wrapped(*args, **kwargs):
        yield output


async def add_request(wrapped: Callable[..., Any], instance: "AsyncLLM", args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wraps AsyncLLM.add_request: load the request's adapter first."""
    request = argument(wrapped, args, kwargs, "lora_request")
    if not isinstance(request, ParadeRequest):
        return await wrapped(*args, **kwargs)
    await ensure_loaded(instance, request)
    registry = AdapterRegistry.of(instance.input_processor)
    registry.arriving += 1
    try:
        return await wrapped(*args, **kwargs)
    finally:
        registry.arriving -= 1
