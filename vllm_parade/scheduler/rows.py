# SPDX-License-Identifier: Apache-2.0
"""The pool of vector rows. A row holds one request's adjusting vectors, in every layer, on every worker."""

from collections.abc import Collection

from vllm_parade.request import IDENTITY_ROW


class RowPool:
    """Hands rows to requests. Row 0 is the identity: requests of the base model and padding use it.

    A request keeps its row until it is freed, also while it is preempted, so that it need not generate again. When no
    row is left, a preempted request loses its row and generates again when it resumes.
    """

    def __init__(self, num_rows: int) -> None:
        """`num_rows` counts row 0."""
        self._free = list(range(num_rows - 1, IDENTITY_ROW, -1))
        self._rows: dict[str, int] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._rows)

    def row(self, request_id: str) -> int:
        """The row of a request that has one."""
        return self._rows[request_id]

    def allocate(self, request_id: str, running: Collection[str]) -> int:
        """Give a request a row, taking the oldest one of a request that isn't running if none is free."""
        assert request_id not in self._rows, f"request {request_id} has a row already"
        if not self._free:
            self.free(next(holder for holder in self._rows if holder not in running))
        self._rows[request_id] = self._free.pop()
        return self._rows[request_id]

    def free(self, request_id: str) -> None:
        """Take a request's row back; a request without one is left alone."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def clear(self) -> None:
        """Take all rows back."""
        for request_id in list(self._rows):
            self.free(request_id)
