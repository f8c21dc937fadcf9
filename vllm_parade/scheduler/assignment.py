# SPDX-License-Identifier: Apache-2.0
"""Assigns vector rows to the tokens of a step."""

from collections.abc import Iterable
from typing import NamedTuple

from vllm_parade.request import Conversation, InstructionKey, Reading
from vllm_parade.scheduler.rows import RowCache


class ScheduledTokens(NamedTuple):
    """The tokens [position, position + tokens) of a request, computed in one step under an adapter."""

    request_id: str
    conversation: Conversation
    position: int
    tokens: int

    @property
    def end(self) -> int:
        """Number of tokens computed after the step."""
        return self.position + self.tokens

    def turns(self) -> range:
        """Numbers of the turns that the tokens belong to. Tokens before the first turn belong to none."""
        turn_at = self.conversation.turn_at
        return range(max(0, turn_at(self.position)), turn_at(self.end - 1) + 1)

    def key(self, turn: int) -> InstructionKey:
        """Key of a turn's instruction."""
        return self.conversation.instructions[turn].key


class StepRows(NamedTuple):
    """The row fields of a StepPlan."""

    rows: dict[str, int]
    readings: dict[str, Reading]
    borders: dict[str, tuple[int, int]]


def assign_rows(cache: RowCache, scheduled: Iterable[ScheduledTokens]) -> StepRows:
    """Acquire the cached rows of a step, allocate the others, and end the holds on turns that the step completes.

    Cached rows are acquired for all requests first, so no allocation evicts them. Holds end last, so no row is read and
    overwritten in the same step.

    Raises:
        RuntimeError: the step computes only a part of an instruction that has no row.
    """
    step = StepRows({}, {}, {})
    uses = [(request, turn) for request in scheduled for turn in request.turns()]
    missing = []
    for request, turn in uses:
        name, key = request.request_id, request.key(turn)
        if cache.holds(name, key):
            _scale(step, request, turn, cache.row(name, key))
        elif key in cache:
            _scale(step, request, turn, cache.acquire(name, key))
        else:
            missing.append((request, turn))
    for request, turn in missing:
        name, key = request.request_id, request.key(turn)
        if key in cache:
            # Another request of this step generates the vectors.
            _scale(step, request, turn, cache.acquire(name, key))
            continue
        instruction = request.conversation.instructions[turn]
        if instruction.start < request.position or instruction.end > request.end:
            raise RuntimeError(f"request {name} is scheduled with only a part of the instruction of turn {turn}")
        row = cache.allocate(name, key)
        step.readings[name] = Reading(instruction, instruction.start - request.position, row)
        _scale(step, request, turn, row)
    for request, turn in uses:
        if request.end >= request.conversation.start_of(turn + 1):
            cache.pass_by(request.request_id, request.key(turn))
    return step


def _scale(step: StepRows, request: ScheduledTokens, turn: int, row: int) -> None:
    first_token = request.conversation.starts[turn] - request.position
    if first_token <= 0:
        step.rows[request.request_id] = row
    else:
        step.borders[request.request_id] = first_token, row
