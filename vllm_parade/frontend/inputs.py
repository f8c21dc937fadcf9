# SPDX-License-Identifier: Apache-2.0
"""Turns a ParadeRequest into an instruction for the engine core. All requests pass here, offline and online."""

import hashlib
import uuid
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_parade.config import ServingConfig, step_tokens
from vllm_parade.frontend.adapters import AdapterRegistry
from vllm_parade.frontend.signatures import argument, with_argument
from vllm_parade.request import EXTRA_ARGS_KEY, Instruction, ParadeRequest

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

# Secret, so that a client's own cache_salt cannot match the salt of keys and values under another tenant's adapter.
_SECRET = uuid.uuid4().hex


def process_inputs(
    wrapped: Callable[..., "EngineCoreRequest"], instance: "InputProcessor", args: tuple, kwargs: dict[str, Any]
) -> "EngineCoreRequest":
    """Wraps InputProcessor.process_inputs: set the request's instruction and its cache salt."""
    parade_request = argument(wrapped, args, kwargs, "lora_request")
    if ServingConfig.from_vllm_config(instance.vllm_config).enable_parade:
        _refuse_forged(argument(wrapped, args, kwargs, "params"))
    if not isinstance(parade_request, ParadeRequest):
        return wrapped(*args, **kwargs)
    if argument(wrapped, args, kwargs, "resumable"):
        raise VLLMValidationError(f"adapter {parade_request.parade_name!r}: streaming input is not supported")
    adapter = AdapterRegistry.of(instance).content_hash(parade_request)
    args, kwargs = with_argument(wrapped, args, kwargs, "lora_request", None)
    request = wrapped(*args, **kwargs)
    instruction = _instruction(instance, request, parade_request, adapter)
    params = request.sampling_params
    # A new dict, because copies of the parameters share the old one (n > 1, callers that reuse them).
    params.extra_args = {**(params.extra_args or {}), EXTRA_ARGS_KEY: instruction.to_extra_args()}
    # Keys and values under an adapter depend on the whole instruction. Only requests with the same one may reuse them.
    request.cache_salt = f"parade:{_SECRET}:{adapter}:{instruction.digest}:{request.cache_salt or ''}"
    return request


def _refuse_forged(params: Any) -> None:
    """Refuse a client's own instruction: `vllm_xargs` becomes extra_args, and could select another tenant's row."""
    if EXTRA_ARGS_KEY in (getattr(params, "extra_args", None) or {}):
        raise VLLMValidationError(
            f"{EXTRA_ARGS_KEY!r} is not a sampling argument; name the adapter as the request's model",
            parameter=f"vllm_xargs.{EXTRA_ARGS_KEY}",
        )


def _instruction(
    processor: "InputProcessor", request: "EngineCoreRequest", parade_request: ParadeRequest, adapter: str
) -> Instruction:
    name = parade_request.parade_name
    if request.sampling_params is None or request.prompt_token_ids is None:
        raise VLLMValidationError(f"adapter {name!r} applies to text generation from tokens only")
    if request.prompt_embeds is not None or request.mm_features:
        # Vectors are cached by tokens, but equal placeholder tokens can stand for different embeddings.
        raise VLLMValidationError(
            f"the prompt has embeddings, but vectors of adapter {name!r} are cached by token ids; "
            "send the prompt as text or tokens, or use the base model",
            parameter="prompt_embeds",
        )
    prompt_tokens = len(request.prompt_token_ids)
    tokens = parade_request.instruction_tokens or prompt_tokens
    if tokens > prompt_tokens:
        raise VLLMValidationError(
            f"instruction_tokens is {tokens}, but the prompt has {prompt_tokens} tokens",
            parameter="instruction_tokens",
            value=tokens,
        )
    most = step_tokens(processor.vllm_config)
    if tokens > most:
        raise VLLMValidationError(
            f"the prompt has {tokens} tokens, but adapter {name!r} must read it in one step of at most {most} "
            "tokens; shorten it, or start the server with a larger --max-num-batched-tokens",
            parameter="prompt",
        )
    if parade_request.freeze_instruction:
        parade_request.instruction_tokens = tokens
    digest = hashlib.sha256(array("q", request.prompt_token_ids[:tokens]).tobytes()).hexdigest()
    return Instruction(adapter=adapter, tokens=tokens, digest=digest)
