# SPDX-License-Identifier: Apache-2.0
"""The workloads. Each is a function that measures an engine and yields result records.

A point is a batch of prompts of one length. Its time to first token ends when all prompts have one token. Its decode
step is the time per further token, once all requests decode. Records have the median and all samples.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.beside import beside
from benchmarks.conversations import conversations, crowd, documents, whole
from benchmarks.engine import Variant, used_mib
from benchmarks.report import Record
from benchmarks.samples import Measured, spread
from benchmarks.worker import COLLECTIVE

ZIPF_EXPONENT = 1.0
BEAM_WIDTH = 3
# For `launches`: tokens of a prompt, and number of kernels listed in a record.
SHORT, SLOWEST = 8, 20


def decode(measured: Measured) -> Iterator[Record]:
    """Time of a decode step at several batch sizes, with a different adapter for each request."""
    variant, length, tokens = measured.variant, measured.points.length, measured.points.decode_tokens
    for batch in measured.points.decode_batches:
        run = partial(variant.step, batch, length, tokens)
        for name, means in measured.samples(run, variant.settings.repeats).items():
            yield {
                "workload": "decode",
                "variant": name,
                "batch": batch,
                "length": length,
                **spread(means, "step"),
                "tokens_per_s": batch / statistics.median(means),
            }


def prefill(measured: Measured) -> Iterator[Record]:
    """Time to first token, for single prompts and batches."""
    variant, repeats = measured.variant, measured.variant.settings.repeats
    for batch, length in measured.points.prefill:
        # Short runs are noisier, so they get more repeats.
        more = 5 * repeats if batch == 1 else repeats + 2 if batch <= 32 else repeats
        for name, samples in measured.samples(partial(variant.run, batch, length, 1), more).items():
            yield {"workload": "prefill", "variant": name, "batch": batch, "length": length, **spread(samples, "ttft")}


def repeat(measured: Measured) -> Iterator[Record]:
    """Time to first token of a repeated prompt, whose keys, values and vectors are cached."""
    variant, sizes = measured.variant, measured.points
    for name, requests in measured.users.items():
        samples = []
        for number in range(sizes.singles):
            prompts, one = variant.prompts(1, sizes.repeated), requests[number % max(len(requests), 1) :][:1]
            first, again = (variant.ask(prompts, 1, one) for _ in range(2))
            samples.append((first, again))
        firsts, seconds = zip(*samples, strict=True)
        figures = {**spread(firsts, "first"), **spread(seconds, "ttft")}
        yield {"workload": "repeat", "variant": name, "batch": 1, "length": sizes.repeated, **figures}


def touch(variant: Variant, adapters: Sequence[Any]) -> float:
    """Use every adapter once, in order, so that all are in host memory; returns the seconds."""
    return variant.run(len(adapters), 16, 1, adapters) if adapters else 0.0


def drawn(adapters: Sequence[Any], count: int, popularity: str) -> list[Any]:
    """Random adapters for `count` requests, uniform or by Zipf's law; the same in every run."""
    if not adapters:
        return []
    exponent = ZIPF_EXPONENT if popularity == "zipf" else 0.0
    weights = [(rank + 1) ** -exponent for rank in range(len(adapters))]
    return random.Random(0).choices(adapters, weights, k=count)


def _alone(adapters: Sequence[Any], count: int, popularity: str) -> list[Sequence[Any]]:
    """Adapters for requests that are sent one at a time.

    With uniform popularity, they cycle in the order of `touch`. So with more adapters than slots, no request finds its
    adapter on the device.
    """
    if popularity == "zipf":
        return [[adapter] for adapter in drawn(adapters, count, popularity)]
    return [[adapters[number % len(adapters)]] if adapters else [] for number in range(count)]


def tenants(measured: Measured) -> Iterator[Record]:
    """Throughput, and time to first token of single requests, by number of adapters.

    Every repeat measures all numbers of adapters, so drift affects all alike.
    """
    variant, sizes = measured.variant, measured.points
    counts = [count for count in sizes.tenants if count <= len(variant.adapters)] or [0]
    points = [(count, popularity) for count in counts for popularity in ("uniform", "zipf")]
    points = [point for point in points if point[0] > 1 or point[1] == "uniform"]
    samples: dict[tuple[int, str], list[tuple[list[float], float]]] = {point: [] for point in points}
    _tenants_sample(measured, *points[0], 0)  # a warm-up
    for number in range(variant.settings.repeats):
        for point, mine in samples.items():
            mine.append(_tenants_sample(measured, *point, number))
    for (count, popularity), mine in samples.items():
        waits, crowd = [wait for alone, _ in mine for wait in alone], [seconds for _, seconds in mine]
        yield {
            "workload": "tenants",
            "variant": variant.name,
            "adapters": count,
            "popularity": popularity,
            **spread(waits, "ttft"),
            "tokens_per_s": sizes.requests * sizes.answer / statistics.median(crowd),
            "seconds_all": crowd,
        }


def _tenants_sample(measured: Measured, count: int, popularity: str, number: int) -> tuple[list[float], float]:
    """Seconds of one repeat: of each single request in its share, and of all `requests` sent at once."""
    variant, sizes = measured.variant, measured.points
    some, share = variant.adapters[:count], -(-sizes.singles // variant.settings.repeats)
    touch(variant, some)
    singles = _alone(some, share * variant.settings.repeats, popularity)[number * share :][:share]
    alone = [variant.run(1, sizes.length, 1, one) for one in singles]
    requests = drawn(some, sizes.requests, popularity)
    return alone, variant.run(sizes.requests, sizes.length, sizes.answer, requests)


def table4(measured: Measured) -> Iterator[Record]:
    """The paper's Table 4: one request with greedy decoding and with beam search, and memory."""
    variant = measured.variant
    yield _table4_row(measured, variant.name)
    if variant.name == "parade":
        # (IA)3 served by PARADE's layers: static vectors, no generators.
        variant.set_static(True)
        yield _table4_row(measured, "ia3")
        variant.set_static(False)


def _table4_row(measured: Measured, name: str) -> Record:
    variant, sizes = measured.variant, measured.points
    repeats = 5 * variant.settings.repeats
    requests = variant.adapters[:1]
    variant.run(1, sizes.length, sizes.answer, requests)
    greedy = [variant.run(1, sizes.length, sizes.answer, requests) for _ in range(repeats)]
    row: Record = {
        "workload": "table4",
        "variant": name,
        "beam1_tokens_per_s": sizes.answer / statistics.median(greedy),
        "beam1_mib": used_mib(),
        "beam1_s_all": greedy,
    }
    try:
        variant.beam_search(BEAM_WIDTH, sizes.length, sizes.answer, requests)
        beams = [variant.beam_search(BEAM_WIDTH, sizes.length, sizes.answer, requests) for _ in range(repeats)]
    # If this vLLM version has no beam search with the adapter, the row records the error.
    except Exception as error:
        return {**row, "beam3_tokens_per_s": None, "beam3_mib": None, "beam3_error": f"{type(error).__name__}: {error}"}
    beam = sizes.answer / statistics.median(beams)
    return {**row, "beam3_tokens_per_s": beam, "beam3_mib": used_mib(), "beam3_s_all": beams}


def collectives(measured: Measured) -> Iterator[Record]:
    """Number of collective operations of each worker for one prompt and its answer."""
    for name, requests in measured.users.items():
        measured.variant.recorded(1, 64, 9, requests)
        for rank, ran in enumerate(measured.variant.recorded(1, 64, 9, requests)):
            counts = {kernel: count for kernel, (count, _) in ran.items() if COLLECTIVE.search(kernel)}
            yield {
                "workload": "collectives",
                "variant": name,
                "rank": rank,
                "count": sum(counts.values()),
                "by": counts,
            }


def launches(measured: Measured) -> Iterator[Record]:
    """Number and total time of the kernels of a decode step on the first worker.

    The difference between a long and a short answer gives the decode steps; prompts are short, so their share is small.
    Counts are rounded, because the number of prefill steps may differ by one.
    """
    variant, steps = measured.variant, measured.points.decode_tokens
    for batch in measured.points.decode_batches:
        for name, requests in measured.users.items():
            variant.run(batch, SHORT, 2, requests)
            few, many = (variant.recorded(batch, SHORT, tokens, requests)[0] for tokens in (2, 2 + steps))
            each: dict[str, tuple[int, float]] = {}
            for kernel, (count, microseconds) in many.items():
                before = few.get(kernel, (0, 0.0))
                each[kernel] = round((count - before[0]) / steps), (microseconds - before[1]) / steps
            slowest = sorted(each, key=lambda kernel: each[kernel][1], reverse=True)[:SLOWEST]
            yield {
                "workload": "launches",
                "variant": name,
                "batch": batch,
                "kernels": sum(count for count, _ in each.values()),
                "busy_us": sum(microseconds for _, microseconds in each.values()),
                "by": {kernel: each[kernel] for kernel in slowest},
            }


WORKLOADS: dict[str, Callable[[Measured], Iterator[Record]]] = {
    "decode": decode,
    "prefill": prefill,
    "repeat": repeat,
    "tenants": tenants,
    "table4": table4,
    "collectives": collectives,
    "launches": launches,
    "conversations": conversations,
    "whole": whole,
    "crowd": crowd,
    "documents": documents,
    "beside": beside,
}
