# SPDX-License-Identifier: Apache-2.0
"""The routing rule: a request goes to a replica that holds its adapter, unless that replica is busy.

Each adapter has its own order of the replicas, by rendezvous hashing of both names. A request goes to the first replica
in this order that is not busy. So an adapter's requests go to the replica that loaded it. A popular adapter spreads to
its second and third replica, always the same ones. When a replica starts or stops, only adapters that use it move. The
order is a pure function of the names: all routers agree without messages, including a new one.

A replica is busy if it has `SLACK` times the mean number of ongoing requests. While the mean is below `max_num_seqs`,
`max_num_seqs` requests are enough to be busy. With fewer than `FREE` requests, a replica is never busy. If the first
`HOMES` replicas of an adapter are all busy, or a request has no adapter, the less busy of two random replicas gets it.

A conversation's next turn goes to the replica of its last turn, which may still have its keys and values in the prefix
cache. If that replica is busy, the turn goes where the rule above sends it.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SLACK = 1.25
FREE = 4
# Replicas that an adapter may spread to. If all are busy, any replica may get the request.
HOMES = 8
CACHED_ORDERS = 1 << 17
# Multipliers and shifts of splitmix64.
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class AffinityRule:
    """The rule for a fixed set of replicas.

    It counts requests with an adapter by their replica: the first in the adapter's order (`home`), another of the first
    `HOMES` (`spread`), or a random one if those are all busy (`elsewhere`). It does not count requests that stay on
    the replica of their conversation.
    """

    def __init__(
        self, replicas: Sequence[str], max_num_seqs: int, *, slack: float = SLACK, free: int = FREE, seed: int = 0
    ) -> None:
        """
        Args:
            replicas: names, at least one; `choose` takes loads in this order
            max_num_seqs: vLLM's max_num_seqs, the number of requests that a replica's engine runs at a time
        """
        if not replicas:
            raise ValueError("no replica is given; the rule needs at least one")
        self.replicas, self.max_num_seqs, self.slack, self.free = list(replicas), max_num_seqs, slack, free
        self.home = self.spread = self.elsewhere = 0
        self._hashes = np.array([_hash(name) for name in replicas], dtype=np.uint64)
        self._random = random.Random(seed)
        self._order = lru_cache(maxsize=CACHED_ORDERS)(self._compute_order)

    def order(self, adapter: str) -> tuple[int, ...]:
        """Indices of an adapter's first replicas in its order, at most `HOMES`."""
        return self._order(adapter)

    def _compute_order(self, adapter: str) -> tuple[int, ...]:
        scores = _mix(self._hashes ^ np.uint64(_hash(adapter)))
        if len(scores) <= HOMES:
            return tuple(np.argsort(scores)[::-1].tolist())
        best = np.argpartition(scores, -HOMES)[-HOMES:]
        return tuple(best[np.argsort(scores[best])[::-1]].tolist())

    def capacity(self, total: int) -> float:
        """Number of ongoing requests at which a replica is busy, if all replicas together have `total`."""
        mean = total / len(self.replicas)
        busy = self.slack * mean
        return max(self.free, min(busy, self.max_num_seqs) if mean < self.max_num_seqs else busy)

    def choose(
        self, adapter: str | None, loads: Sequence[int], total: int | None = None, *, kept: int | None = None
    ) -> int:
        """Index of the replica that gets a request.

        Args:
            adapter: name, or None for the base model
            loads: number of ongoing requests of each replica
            total: sum of `loads`, if the caller knows it
            kept: index of the replica of the conversation's last turn, if there is one
        """
        if adapter is None and kept is None:
            return self._less_busy(loads)
        capacity = self.capacity(sum(loads) if total is None else total)
        if kept is not None and loads[kept] < capacity:
            return kept
        if adapter is None:
            return self._less_busy(loads)
        for rank, place in enumerate(self.order(adapter)):
            if loads[place] < capacity:
                self.home += rank == 0
                self.spread += rank > 0
                return place
        self.elsewhere += 1
        return self._less_busy(loads)

    def _less_busy(self, loads: Sequence[int]) -> int:
        first, second = (self._random.randrange(len(loads)) for _ in range(2))
        return first if loads[first] <= loads[second] else second


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> _SHIFTS[0])) * _MIX[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MIX[1]
    return values ^ (values >> _SHIFTS[2])
