# SPDX-License-Identifier: Apache-2.0
"""Limits the tokens of a request in one step."""

from collections.abc import Callable
from typing import NamedTuple

from vllm_parade.request import Conversation, Instruction


class Chunk(NamedTuple):
    """A request's part of a step."""

    tokens: int
    """Number of tokens; 0 if the request cannot run in this step."""
    reading: Instruction | None
    """The instruction that the generators must read in these tokens."""


def next_chunk(
    conversation: Conversation,
    position: int,
    offered: int,
    has_vectors: Callable[[Instruction], bool],
    *,
    can_read: bool,
    can_cross: bool,
) -> Chunk:
    """The longest chunk that a step can compute.

    The step that generates an instruction's vectors computes the whole instruction. A chunk has tokens of at most two
    turns and at most one instruction that must be read.

    Args:
        conversation: the request's turns
        position: number of tokens computed so far
        offered: largest number of tokens, 0 or more
        has_vectors: whether an instruction's vectors exist
        can_read: whether the adapter can have a slot in this step
        can_cross: whether the request can hold a second row in this step
    """
    turn = conversation.turn_at(position)
    border = conversation.start_of(turn + 1)
    end = min(position + offered, conversation.start_of(turn + 2))
    reading = None
    if turn >= 0 and not has_vectors(conversation.instructions[turn]):
        reading = conversation.instructions[turn]
        if position > reading.start or end < reading.end or not can_read:
            return Chunk(0, None)
    if end > border:
        following = conversation.instructions[turn + 1]
        if turn >= 0 and not can_cross:
            end = border
        elif not has_vectors(following):
            if reading is None and can_read and end >= following.end:
                reading = following
            else:
                end = border
    return Chunk(end - position, reading)
