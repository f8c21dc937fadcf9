# SPDX-License-Identifier: Apache-2.0
"""Workloads whose prompts share a history: conversations of several turns, and documents that tenants share.

Prompts are the same for all variants: each user message stands between the markers of the PARADE adapters. Answers
have a fixed length. Every repeat has new contents, so only its own history can be cached. Time to first token is vLLM's
metric: from a request's arrival in the front end to its first token there.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.engine import Variant
from benchmarks.report import Record
from benchmarks.samples import Measured, Points, spread

# Turns of the warm-up conversations, which compile all kernels and load all adapters.
WARM_UP_TURNS = 2


class Talk(NamedTuple):
    """Measurements of conversations held at the same time."""

    ttfts: list[float]
    """Seconds to the first token of each turn, mean over the conversations."""
    computed: int
    """Prompt tokens that were not cached, over all turns and conversations."""


def talk(variant: Variant, sizes: Points, count: int, turns: int, adapters: Sequence[Any]) -> Talk:
    """Hold `count` conversations. All messages of a turn are sent together, after all answers of the turn before.

    A prompt is the previous turn's prompt, its answer, and a new message. Conversations use `adapters` in turn.
    """
    histories: list[list[int]] = [[] for _ in range(count)]
    ttfts, computed = [], 0
    for _ in range(turns):
        for history in histories:
            history += variant.message(sizes.asked)
        prompts = [{"prompt_token_ids": list(history)} for history in histories]
        outputs = variant.outputs(prompts, sizes.answered, adapters)
        ttfts.append(statistics.mean(output.metrics.first_token_latency for output in outputs))
        computed += sum(computed_tokens(output) for output in outputs)
        for history, output in zip(histories, outputs, strict=True):
            history += output.outputs[0].token_ids
    return Talk(ttfts, computed)


def computed_tokens(output: Any) -> int:
    """Prompt tokens of a request that were not in the prefix cache."""
    return len(output.prompt_token_ids) - output.num_cached_tokens


def conversations(measured: Measured) -> Iterator[Record]:
    """One conversation at a time, and several at once. PARADE adapters mark their turns."""
    variant, repeats = measured.variant, measured.variant.settings.repeats
    for count in measured.points.conversations:
        yield _conversations(measured, variant.name, count, variant.few, repeats)


def whole(measured: Measured) -> Iterator[Record]:
    """Like `conversations`, with PARADE adapters that read the whole prompt. Yields nothing for other variants."""
    variant, repeats = measured.variant, measured.variant.settings.repeats
    if variant.name == "parade":
        for count in measured.points.conversations:
            yield _conversations(measured, "parade-whole", count, variant.adapters[: len(variant.few)], repeats)


def crowd(measured: Measured) -> Iterator[Record]:
    """Many conversations at once, without repeats: the figure of interest is the number of computed tokens.

    Needs 117 GiB of KV cache for LLaMA-2 7B, 30 GiB for LLaMA-3 8B.
    """
    variant = measured.variant
    yield _conversations(measured, variant.name, measured.points.crowd, variant.few, 1)


def _conversations(measured: Measured, name: str, count: int, adapters: Sequence[Any], repeats: int) -> Record:
    turns = measured.points.turns
    # One warm-up has a conversation for each adapter, so all adapters are loaded.
    for warm_up in sorted({max(1, len(adapters)), count}):
        _sample(measured, warm_up, WARM_UP_TURNS, adapters)
    return _record(measured, name, count, [_sample(measured, count, turns, adapters) for _ in range(repeats)])


def _sample(measured: Measured, count: int, turns: int, adapters: Sequence[Any]) -> Talk:
    with measured.variant.turn():
        return talk(measured.variant, measured.points, count, turns, adapters)


def _record(measured: Measured, name: str, count: int, talks: Sequence[Talk]) -> Record:
    sizes, computed = measured.points, [talk.computed for talk in talks]
    by_turn = zip(*(talk.ttfts for talk in talks), strict=True)
    needed = count * sizes.turns * (sizes.asked + sizes.answered)
    return {
        "workload": "conversations",
        "variant": name,
        "conversations": count,
        "turns": sizes.turns,
        "asked": sizes.asked,
        "answered": sizes.answered,
        **spread([sum(talk.ttfts) for talk in talks], "ttft_sum"),
        **spread([talk.ttfts[-1] for talk in talks], "ttft_last"),
        "ttft_ms_by_turn": [1e3 * statistics.median(turn) for turn in by_turn],
        "computed_tokens": statistics.median(computed),
        "computed_tokens_all": computed,
        "rows": measured.variant.rows(),
        # If false, histories are evicted and computed again in every variant.
        "fits_cache": needed <= measured.variant.cache_tokens(),
    }


def documents(measured: Measured) -> Iterator[Record]:
    """A document before the first turn. Several tenants ask one question each about it, one after the other."""
    variant, sizes = measured.variant, measured.points
    _shared(measured, min(sizes.documents))
    for length in sizes.documents:
        samples = [_shared(measured, length) for _ in range(variant.settings.repeats)]
        later = [tenant for _, *others in samples for tenant in others]
        yield {
            "workload": "documents",
            "variant": variant.name,
            "document": length,
            "tenants": sizes.sharing,
            "question": sizes.question,
            **spread([first.ttft for first, *_ in samples], "first"),
            **spread([tenant.ttft for tenant in later], "ttft"),
            "computed_tokens": statistics.median(tenant.computed for tenant in later),
        }


class Tenant(NamedTuple):
    """One tenant's question: seconds to its first token, and prompt tokens that were not cached."""

    ttft: float
    computed: int


def _shared(measured: Measured, length: int) -> list[Tenant]:
    with measured.variant.turn():
        return share(measured.variant, measured.points, length)


def share(variant: Variant, sizes: Points, length: int) -> list[Tenant]:
    """Ask about a new document, each tenant under another adapter and with a question of its own."""
    document, tenants = variant.words(length), []
    for number in range(sizes.sharing):
        prompt = {"prompt_token_ids": [*document, *variant.message(sizes.question)]}
        one = variant.few[number % len(variant.few) :][:1] if variant.few else []
        (output,) = variant.outputs([prompt], sizes.reply, one)
        tenants.append(Tenant(output.metrics.first_token_latency, computed_tokens(output)))
    return tenants
