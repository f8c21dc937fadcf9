# SPDX-License-Identifier: Apache-2.0
"""Which replica gets a request: one that holds its adapter, unless that one is clearly busier than the others.

Every adapter has the replicas in an order of its own, by rendezvous hashing of both names. A request goes to the first
in that order that is not busy. So an adapter's requests meet where it was loaded; a hot adapter spreads to its second
and third replica, always the same ones; and when a replica comes or goes, only adapters that had it move. The order
needs no memory and no messages: every router of an application sends alike, and so does one that has just started.

A replica is busy with `SLACK` times the mean of requests under way, or with as many as its engine runs at a time while
the mean is below that, but never with fewer than `FREE`. Where all of an adapter's first replicas are busy, or there is
no adapter, the less busy of two that chance picks takes the request.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SLACK = 1.25
FREE = 4
# Replicas an adapter may spread to before anybody takes its requests.
HOMES = 8
CACHED_ORDERS = 1 << 17
# A multiplier and shifts that spread 64 bits (splitmix64).
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class AffinityRule:
    """The rule for a set of replicas; make a new one when the set changes.

    Its counts tell requests with an adapter that went to the first replica of their order (`home`), to another of the
    first `HOMES` (`spread`), or to any (`elsewhere`).
    """

    def __init__(
        self, replicas: Sequence[str], max_num_seqs: int, *, slack: float = SLACK, free: int = FREE, seed: int = 0
    ) -> None:
        """For `replicas` by name, at least one; loads are given in their order.

        Args:
            max_num_seqs: requests that a replica's engine runs at a time, vLLM's max_num_seqs
        """
        if not replicas:
            raise ValueError("there is no replica to send a request to")
        self.replicas, self.max_num_seqs, self.slack, self.free = list(replicas), max_num_seqs, slack, free
        self.home = self.spread = self.elsewhere = 0
        self._hashes = np.array([_hash(name) for name in replicas], dtype=np.uint64)
        self._random = random.Random(seed)
        self._order = lru_cache(maxsize=CACHED_ORDERS)(self._compute_order)

    def order(self, adapter: str) -> tuple[int, ...]:
        """Places of an adapter's first replicas, at most `HOMES`, the likeliest holder first."""
        return self._order(adapter)

    def _compute_order(self, adapter: str) -> tuple[int, ...]:
        scores = _mix(self._hashes ^ np.uint64(_hash(adapter)))
        if len(scores) <= HOMES:
            return tuple(np.argsort(scores)[::-1].tolist())
        best = np.argpartition(scores, -HOMES)[-HOMES:]
        return tuple(best[np.argsort(scores[best])[::-1]].tolist())

    def capacity(self, total: int) -> float:
        """Requests under way with which a replica is busy, where all together have `total`."""
        mean = total / len(self.replicas)
        busy = self.slack * mean
        return max(self.free, min(busy, self.max_num_seqs) if mean < self.max_num_seqs else busy)

    def choose(self, adapter: str | None, loads: Sequence[int], total: int | None = None) -> int:
        """Place of the replica that gets a request.

        Args:
            adapter: name, or None for the base model
            loads: requests under way on each replica
            total: their sum, where the caller knows it
        """
        if adapter is None:
            return self._less_busy(loads)
        capacity = self.capacity(sum(loads) if total is None else total)
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
