# SPDX-License-Identifier: Apache-2.0
"""Adapters under their names in the OpenAI-compatible server."""

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from vllm_parade.config import ServingConfig
from vllm_parade.frontend.adapters import AdapterRegistry, argument, load_adapter
from vllm_parade.request import ParadeRequest

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels


async def init_static_loras(
    wrapped: Callable[..., Any], instance: "OpenAIServingModels", args: tuple, kwargs: dict[str, Any]
) -> None:
    """Wraps OpenAIServingModels.init_static_loras: load --parade-modules and list them beside LoRA's names.

    /v1/models, the check of a request's model, 404 for unknown names, chat, completions and beam search all read that
    one list.
    """
    await wrapped(*args, **kwargs)
    engine = instance.engine_client
    for module in ServingConfig.from_vllm_config(engine.vllm_config).parade_modules:
        request = ParadeRequest(module.name, module.path, base_model_name=module.base_model_name)
        await load_adapter(engine, request)
        AdapterRegistry.of(engine.input_processor).pin(request)
        instance.lora_requests[module.name] = request


async def beam_search(
    wrapped: Callable[..., AsyncGenerator[Any, None]], instance: Any, args: tuple, kwargs: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    """Wraps BeamSearchOnlineMixin.beam_search: later steps keep the original prompt as their instruction."""
    request = argument(wrapped, args, kwargs, "lora_request")
    if isinstance(request, ParadeRequest):
        if "lora_request" not in kwargs:
            raise TypeError("beam_search takes lora_request by keyword")
        kwargs = {**kwargs, "lora_request": request.for_beam_search()}
    async for output in wrapped(*args, **kwargs):
        yield output
