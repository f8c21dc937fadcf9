# SPDX-License-Identifier: Apache-2.0
"""The vector rows. A row holds the adjusting vectors of one instruction under one adapter, in every layer, on every
worker."""

from collections import OrderedDict, defaultdict

from vllm_parade.request import IDENTITY_ROW, InstructionKey


class RowCache:
    """Maps instructions to rows, and counts the requests that use each row.

    A request holds the row of the turn whose tokens it computes. A row that no request holds stays cached until it is
    evicted. Rows are evicted in the order of last use. Rows of completed turns are evicted first, because the
    conversation's next request needs only the last turn's row. Row 0 is the identity row, for requests of the base
    model and padding.
    """

    def __init__(self, num_rows: int) -> None:
        """`num_rows` includes row 0 and must be larger than the number of requests that can run."""
        self._free = list(range(num_rows - 1, IDENTITY_ROW, -1))
        self._rows: dict[InstructionKey, int] = {}
        self._idle: OrderedDict[InstructionKey, int] = OrderedDict()
        self._held: dict[str, dict[InstructionKey, int]] = defaultdict(dict)
        self._holders: dict[int, int] = {}
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __contains__(self, key: InstructionKey) -> bool:
        """Whether a row holds these vectors, or will when the planned steps have run."""
        return key in self._rows

    def __len__(self) -> int:
        """Number of rows that requests hold."""
        return len(self._holders)

    @property
    def available(self) -> int:
        """Number of rows that no request holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_holders(self) -> int:
        """Number of requests that hold a row."""
        return len(self._held)

    def holds(self, request_id: str, key: InstructionKey) -> bool:
        """Whether a request holds the row of an instruction."""
        return key in self._held.get(request_id, ())

    def held(self, request_id: str) -> list[int]:
        """All rows that a request holds."""
        return list(self._held.get(request_id, {}).values())

    def row(self, request_id: str, key: InstructionKey) -> int:
        """The row of an instruction, which the request holds."""
        return self._held[request_id][key]

    def acquire(self, request_id: str, key: InstructionKey) -> int:
        """Let a request hold the cached row of an instruction."""
        self.hits += 1
        return self._hold(request_id, key, self._rows[key])

    def allocate(self, request_id: str, key: InstructionKey) -> int:
        """Let a request hold a new row for an instruction that has none. The step must write the row."""
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
        held = self._held[request_id]
        assert key not in held, f"request {request_id} holds the row of {key} already"
        self._idle.pop(key, None)
        held[key] = row
        self._holders[row] = self._holders.get(row, 0) + 1
        return row

    def release(self, request_id: str) -> None:
        """End all holds of a finished or preempted request. Does nothing for a request without holds."""
        for key, row in self._held.pop(request_id, {}).items():
            self._let_go(key, row, passed=False)

    def pass_by(self, request_id: str, key: InstructionKey) -> None:
        """End a request's hold on the row of a turn whose tokens are all computed."""
        held = self._held[request_id]
        self._let_go(key, held.pop(key), passed=True)
        if not held:
            del self._held[request_id]

    def _let_go(self, key: InstructionKey, row: int, *, passed: bool) -> None:
        self._holders[row] -= 1
        if self._holders[row]:
            return
        del self._holders[row]
        if self._rows.get(key) != row:
            self._free.append(row)
            return
        self._idle[key] = row
        if passed:
            self._idle.move_to_end(key, last=False)

    def forget(self) -> None:
        """Forget all cached rows, e.g. after a weight update. A row in use is kept until its holds end."""
        self._free += self._idle.values()
        self._idle.clear()
        self._rows.clear()
