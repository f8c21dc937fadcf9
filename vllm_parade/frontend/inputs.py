# SPDX-License-Identifier: Apache-2.0
"""Finds the turns of a request under an adapter, for the engine core. All requests pass here, offline and online."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_parade.adapter.turns import find_turns, turn_digests
from vllm_parade.config import ServingConfig, step_tokens
from vllm_parade.frontend.adapters import AdapterRegistry
from vllm_parade.frontend.signatures import argument, with_argument
from vllm_parade.request import EXTRA_ARGS_KEY, Conversation, Instruction, ParadeRequest

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

# In a request's `vllm_xargs`: the number of tokens, from the prompt's start, that hold its instructions.
TOKENS_ARGUMENT = "parade_instruction_tokens"


def process_inputs(
    wrapped: Callable[..., "EngineCoreRequest"], instance: "InputProcessor", args: tuple, kwargs: dict[str, Any]
) -> "EngineCoreRequest":
    """Wraps InputProcessor.process_inputs: find the turns of a request under an adapter."""
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
    conversation = _conversation(instance, request, parade_request, adapter)
    params = request.sampling_params
    # A new dict, because copies of the parameters share the old one (n > 1, callers that reuse them).
    params.extra_args = {**(params.extra_args or {}), EXTRA_ARGS_KEY: conversation.to_extra_args()}
    return request


def _refuse_forged(params: Any) -> None:
    """Refuse a client's own instruction: `vllm_xargs` becomes extra_args, and could select another tenant's row."""
    if EXTRA_ARGS_KEY in (getattr(params, "extra_args", None) or {}):
        raise VLLMValidationError(
            f"{EXTRA_ARGS_KEY!r} is not a sampling argument; name the adapter as the request's model",
            parameter=f"vllm_xargs.{EXTRA_ARGS_KEY}",
        )


def _conversation(
    processor: "InputProcessor", request: "EngineCoreRequest", parade_request: ParadeRequest, adapter: str
) -> Conversation:
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
    tokens = _prompt_part(request, parade_request)
    markers = AdapterRegistry.of(processor).turn_markers(adapter)
    turns = find_turns(tokens, markers)
    longest, most = max(turn.end - turn.start for turn in turns), step_tokens(processor.vllm_config)
    if longest > most:
        what = "the prompt" if markers is None else "a message of the prompt"
        raise VLLMValidationError(
            f"{what} has {longest} tokens, but adapter {name!r} must read it in one step of at most {most} tokens; "
            "shorten it, or start the server with a larger --max-num-batched-tokens",
            parameter="prompt",
        )
    digests = turn_digests(tokens, turns, request.cache_salt or "")
    return Conversation(tuple(Instruction(adapter, *turn, d) for turn, d in zip(turns, digests, strict=True)))


def _prompt_part(request: "EngineCoreRequest", parade_request: ParadeRequest) -> list[int]:
    """The tokens in which the generators look for instructions: the prompt's first `instruction_tokens`, or all."""
    prompt = request.prompt_token_ids
    asked = (request.sampling_params.extra_args or {}).get(TOKENS_ARGUMENT)
    if asked is not None and (type(asked) is not int or asked < 1):
        raise VLLMValidationError(
            f"{TOKENS_ARGUMENT} is {asked!r}; expected a positive whole number",
            parameter=f"vllm_xargs.{TOKENS_ARGUMENT}",
            value=asked,
        )
    tokens = parade_request.instruction_tokens or asked or len(prompt)
    if tokens > len(prompt):
        raise VLLMValidationError(
            f"instruction_tokens is {tokens}, but the prompt has {len(prompt)} tokens",
            parameter="instruction_tokens",
            value=tokens,
        )
    if parade_request.freeze_instruction:
        parade_request.instruction_tokens = tokens
    return prompt[:tokens]
