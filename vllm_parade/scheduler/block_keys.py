# SPDX-License-Identifier: Apache-2.0
"""Hash keys that distinguish KV blocks of equal tokens under different vectors."""

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_parade.request import Conversation

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Attribute of a vLLM request that stores its conversation.
ATTRIBUTE = "parade_conversation"


def conversation_of(request: "Request") -> Conversation | None:
    """The turns of a PARADE request; None for a request of the base model."""
    # Cached on the request: needed in every step.
    known: dict[str, Any] = vars(request)
    if ATTRIBUTE not in known:
        known[ATTRIBUTE] = Conversation.from_extra_args(request.sampling_params and request.sampling_params.extra_args)
    conversation: Conversation | None = known[ATTRIBUTE]
    return conversation


def add_turn_keys(wrapped: Callable[..., list[Any]], instance: None, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Wraps _gen_prompt_embeds_extra_hash_keys: adds a key to a block for each turn that starts in it.

    vLLM chains block hashes, so all later blocks differ too. Blocks before the first turn get no key, so base requests
    and all adapters share them.
    """
    keys = wrapped(*args, **kwargs)
    request, block_start, block_end = args
    conversation = conversation_of(request)
    if conversation is None or block_start > conversation.starts[-1]:
        return keys
    first, last = (bisect_left(conversation.starts, position) for position in (block_start, block_end))
    # KV events publish the second entry of a key.
    turns = conversation.instructions[first:last]
    return [*keys, *(("parade", f"{instruction.adapter}:{instruction.digest}") for instruction in turns)]
