# SPDX-License-Identifier: Apache-2.0
"""The vector rows. A row holds the vectors of one instruction under one adapter, in every layer, on every worker."""

from collections import OrderedDict

from vllm_parade.request import IDENTITY_ROW, InstructionKey


class RowCache:
    """Maps instructions to rows, and rows to the running requests that hold them.

    A row that no request holds stays cached for later requests with the same instruction. If no row is free, the least
    recently used cached row is evicted. Row 0 is the identity: requests of the base model and padding use it.
    """

    def __init__(self, num_rows: int) -> None:
        """`num_rows` includes row 0, so it must be at least one more than the maximum of running requests."""
        self._free = list(range(num_rows - 1, IDENTITY_ROW, -1))
        self._rows: dict[InstructionKey, int] = {}
        self._idle: OrderedDict[InstructionKey, int] = OrderedDict()
        self._held: dict[str, tuple[InstructionKey, int]] = {}
        self._holders: dict[int, int] = {}
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __contains__(self, key: InstructionKey) -> bool:
        """Whether a row holds these vectors, now or after the planned steps."""
        return key in self._rows

    def __len__(self) -> int:
        """Number of rows that requests hold."""
        return len(self._holders)

    def holds(self, request_id: str) -> bool:
        """Whether a request holds a row."""
        return request_id in self._held

    def row(self, request_id: str) -> int:
        """The row of a request.

        Raises:
            KeyError: the request holds none.
        """
        return self._held[request_id][1]

    def acquire(self, request_id: str, key: InstructionKey) -> int:
        """Let a request hold the existing row of an instruction. Returns the row."""
        self.hits += 1
        return self._hold(request_id, key, self._rows[key])

    def allocate(self, request_id: str, key: InstructionKey) -> int:
        """Let a request hold a row for new vectors. Evicts the least recently used cached row if none is free."""
        assert key not in self._rows, f"instruction {key} has a row already"
        self.misses += 1
        if self._free:
            row = self._free.pop()
        else:
            evicted, row = self._idle.popitem(last=False)
            del self._rows[evicted]
            self.evictions += 1
        self._rows[key] = row
        return self._hold(request_id, key, row)

    def _hold(self, request_id: str, key: InstructionKey, row: int) -> int:
        assert request_id not in self._held, f"request {request_id} has a row already"
        self._idle.pop(key, None)
        self._held[request_id] = key, row
        self._holders[row] = self._holders.get(row, 0) + 1
        return row

    def release(self, request_id: str) -> None:
        """End a request's hold after it has ended or been preempted. Does nothing if it holds no row."""
        if request_id not in self._held:
            return
        key, row = self._held.pop(request_id)
        self._holders[row] -= 1
        if self._holders[row]:
            return
        del self._holders[row]
        if self._rows.get(key) == row:
            self._idle[key] = row
        else:
            self._free.append(row)

    def forget(self) -> None:
        """Forget the instruction of every row, for example when weights change. Requests that hold a row keep it."""
        self._free += self._idle.values()
        self._idle.clear()
        self._rows.clear()
