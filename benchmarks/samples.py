# SPDX-License-Identifier: Apache-2.0
"""Shared code of the workloads: their sizes, the measured engine, and records of samples."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engine import Variant
from benchmarks.report import Record

# Number of adapters in all workloads but `tenants`: one per request of the largest batch.
MANY = 256


@dataclass(frozen=True)
class Points:
    """Sizes of the workloads."""

    decode_batches: tuple[int, ...] = (1, 32, 256)
    length: int = 274
    decode_tokens: int = 64
    prefill: tuple[tuple[int, int], ...] = ((1, 274), (1, 600), (32, 274), (256, 274), (1, 8192))
    tenants: tuple[int, ...] = (1, 8, 64, 512, 1000)
    requests: int = 512
    singles: int = 30
    repeated: int = 512
    answer: int = 32
    conversations: tuple[int, ...] = (1, 16)
    crowd: int = 40
    turns: int = 12
    asked: int = 400
    answered: int = 100
    documents: tuple[int, ...] = (6000, 32000)
    sharing: int = 8
    question: int = 40
    reply: int = 8
    beside: int = 32


TINY = Points(
    decode_batches=(1, 4),
    length=16,
    decode_tokens=4,
    prefill=((1, 16), (4, 16)),
    tenants=(1, 4),
    requests=8,
    singles=4,
    repeated=40,
    answer=4,
    conversations=(1, 2),
    crowd=3,
    turns=3,
    asked=40,
    answered=4,
    documents=(64, 200),
    sharing=3,
    question=8,
    reply=2,
    beside=3,
)


def points(size: str) -> Points:
    """The sizes of the workloads for a model size."""
    return TINY if size == "tiny" else Points()


class Measured:
    """An engine and its users. A user is a set of requests; users are measured in turn."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.points = points(variant.settings.size)
        self.many = variant.adapters[:MANY]
        # "unused" measures a PARADE engine with requests of the base model only.
        self.users: dict[str, Sequence[Any]] = {"unused": (), "parade": self.many}
        if variant.name != "parade":
            self.users = {variant.name: self.many}

    def samples(self, run: Callable[[Sequence[Any]], float], repeats: int) -> dict[str, list[float]]:
        """Seconds of `run` with each user's requests, after one warm-up. Users take turns, so drift hits all alike."""
        samples: dict[str, list[float]] = {name: [] for name in self.users}
        for number in range(repeats + 1):
            with self.variant.turn():
                for name, requests in self.users.items():
                    seconds = run(requests)
                    samples[name] += [seconds] if number else []
        return samples


def spread(samples: Sequence[float], name: str) -> Record:
    """Median, p20, p80 and all samples of `name`_ms in milliseconds, from samples in seconds."""
    values = sorted(1e3 * sample for sample in samples)
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {
        f"{name}_ms": statistics.median(values),
        f"{name}_ms_p20": fifths[0],
        f"{name}_ms_p80": fifths[3],
        f"{name}_ms_all": [round(value, 3) for value in values],
    }
