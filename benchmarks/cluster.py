# SPDX-License-Identifier: Apache-2.0
"""Simulates a cluster with the real routing rule: how many adapter loads affinity saves, and how long requests wait.

Requests arrive at random (Poisson). The popularity of their adapters follows Zipf's law. A replica runs `REQUEST_LIMIT`
requests at a time and queues the others. It holds the most recently used adapters; a request with another adapter takes
`LOAD_S` longer.
"""

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vllm_parade.cluster import AffinityRule

Choose = Callable[[str, Sequence[int], int], int]
# Requests that a replica runs at a time (--max-num-seqs).
REQUEST_LIMIT = 32
SERVICE_S = 2.0
# Seconds to read one adapter from disk or network into host memory.
LOAD_S = 0.2


@dataclass(frozen=True)
class Simulation:
    """Parameters of a simulation."""

    replicas: int = 1000
    adapters: int = 100_000
    held: int = 256
    """Adapters in a replica's host memory."""
    zipf: float = 1.0
    utilisation: float = 0.7
    """Offered load, as a share of the requests that all replicas can run at a time; load times not included."""
    requests: int = 300_000
    seed: int = 0


class SimulatedReplica:
    """A replica's running requests, queue and most recently used adapters."""

    def __init__(self, held: int) -> None:
        self.capacity, self.running = held, 0
        self.adapters: OrderedDict[int, None] = OrderedDict()
        self.queue: deque[tuple[float, int, float]] = deque()

    def load(self, adapter: int) -> bool:
        """Use an adapter; returns whether it had to be loaded."""
        missing = adapter not in self.adapters
        self.adapters[adapter] = None
        self.adapters.move_to_end(adapter)
        if len(self.adapters) > self.capacity:
            self.adapters.popitem(last=False)
        return missing


def simulate(simulation: Simulation, name: str) -> dict[str, Any]:
    """Simulate the rule `name` and return a record. The first tenth of the time is warm-up and is not counted."""
    rule = AffinityRule([f"replica{number}" for number in range(simulation.replicas)], REQUEST_LIMIT)
    choose = RULES[name](rule, random.Random(simulation.seed + 1))
    source = random.Random(simulation.seed)
    weights = list(accumulate((rank + 1) ** -simulation.zipf for rank in range(simulation.adapters)))
    adapters = source.choices(range(simulation.adapters), cum_weights=weights, k=simulation.requests)
    rate = simulation.utilisation * simulation.replicas * REQUEST_LIMIT / SERVICE_S
    replicas = [SimulatedReplica(simulation.held) for _ in range(simulation.replicas)]
    loads, total, now = [0] * simulation.replicas, 0, 0.0
    ends: list[tuple[float, int]] = []
    waits: list[float] = []
    misses = counted = 0

    def start(place: int, arrived: float, adapter: int, service: float, at: float) -> None:
        nonlocal misses
        replica = replicas[place]
        replica.running += 1
        missing = replica.load(adapter)
        misses += missing and arrived >= warm
        if arrived >= warm:
            waits.append(at - arrived + (LOAD_S if missing else 0.0))
        heapq.heappush(ends, (at + service + (LOAD_S if missing else 0.0), place))

    warm = simulation.requests / 10 / rate
    for adapter in adapters:
        now += source.expovariate(rate)
        while ends and ends[0][0] <= now:
            ended, place = heapq.heappop(ends)
            replicas[place].running -= 1
            loads[place] -= 1
            total -= 1
            if replicas[place].queue:
                start(place, *replicas[place].queue.popleft(), ended)
        place = choose(f"adapter{adapter}", loads, total)
        loads[place] += 1
        total += 1
        counted += now >= warm
        service = source.expovariate(1 / SERVICE_S)
        if replicas[place].running < REQUEST_LIMIT:
            start(place, now, adapter, service, now)
        else:
            replicas[place].queue.append((now, adapter, service))
    waits.sort()
    return {
        "workload": "cluster",
        "variant": name,
        **vars(simulation),
        "load_misses": misses / max(counted, 1),
        **{f"wait_ms_p{p}": 1e3 * waits[min(len(waits) - 1, len(waits) * p // 100)] for p in (50, 99)},
        "wait_ms_mean": 1e3 * sum(waits) / len(waits),
        "most_busy": max(loads) / max(total / simulation.replicas, 1e-9),
        "home": rule.home / simulation.requests,
        "spread": rule.spread / simulation.requests,
        "elsewhere": rule.elsewhere / simulation.requests,
    }


def _affinity(rule: AffinityRule, source: random.Random) -> Choose:
    return lambda adapter, loads, total: rule.choose(adapter, loads, total)


def _random(rule: AffinityRule, source: random.Random) -> Choose:
    return lambda adapter, loads, total: source.randrange(len(loads))


def _two_choices(rule: AffinityRule, source: random.Random) -> Choose:
    return lambda adapter, loads, total: rule.choose(None, loads, total)


RULES: dict[str, Callable[[AffinityRule, random.Random], Choose]] = {
    "affinity": _affinity,
    "random": _random,
    "two choices": _two_choices,
}
