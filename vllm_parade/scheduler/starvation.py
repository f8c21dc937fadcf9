# SPDX-License-Identifier: Apache-2.0
"""Reserves tokens of a step for an instruction that has found no room for several steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Number of steps without room for an instruction after which running requests get fewer tokens.
PATIENCE = 4


class StarvationGuard:
    """Counts the steps in which an instruction found no room, and limits the other running requests for one step."""

    def __init__(self, drafting: int) -> None:
        """`drafting`: draft slots that each request takes from a step in addition to its tokens."""
        self.request: Request | None = None
        """The first request whose instruction found no room."""
        self.steps = 0
        """Number of steps in which it found no room."""
        self.drafting = drafting
        self._share: int | None = None
        self._found: Request | None = None

    def waits_too_long(self) -> bool:
        """Whether the request must get room in the next step."""
        return self.request is not None and not self.request.is_finished() and self.steps >= PATIENCE

    def begin(self, share: int | None) -> None:
        """Begin a step.

        Args:
            share: tokens, drafting slots included, that the other running requests may take; None for no limit
        """
        self._share, self._found = share, None

    def limits(self, request: "Request", *, running: bool) -> bool:
        """Whether a request's tokens are limited in this step."""
        return self._share is not None and running and request is not self.request

    def limit(self, tokens: int) -> int:
        """The part of `tokens` that a limited request may take."""
        assert self._share is not None
        return max(0, min(tokens, self._share - self.drafting))

    def take(self, tokens: int) -> None:
        """Count the tokens that a limited request gets."""
        assert self._share is not None
        self._share -= tokens + self.drafting if tokens else 0

    def found_no_room(self, request: "Request") -> None:
        """Note that a request's instruction does not fit into this step. The first one counts."""
        self._found = self._found or request

    def found_room(self, request: "Request") -> None:
        """Note that a request's instruction runs in this step."""
        if request is self.request:
            self.request = None

    def end(self, unseen: "Request | None") -> None:
        """End a step.

        Args:
            unseen: the first waiting request, if the step was full before vLLM considered any
        """
        found = self._found or unseen
        if self._share is not None:
            # Reset even if the request did not run: it may lack something other than tokens.
            self.request, self.steps = None, 0
        elif found is not None:
            self.steps = self.steps + 1 if found is self.request else 1
            self.request = found
