# SPDX-License-Identifier: Apache-2.0
"""Conversations and shared documents: their prompts, and the records of their samples."""

from typing import Any

import pytest

from benchmarks.conversations import conversations, crowd, documents, share, talk, whole
from benchmarks.models import marker_tokens
from benchmarks.samples import TINY, Measured
from tests.benchmarks.fakes import ANSWER, BLOCK, FakeVariant
from vllm_parade.adapter.turns import TurnMarkers, find_turns

START, END = map(tuple, marker_tokens("tiny").values())
TURN = TINY.asked + TINY.answered


def measured_of(variant: Any) -> Measured:
    measured = Measured.__new__(Measured)
    measured.variant, measured.points = variant, TINY
    return measured


def test_prompts_grow_by_answers_and_messages() -> None:
    variant = FakeVariant()
    talk(variant, TINY, 2, 3, ())
    for number in range(2):
        first, second, third = (prompts[number] for prompts, _ in variant.calls)
        assert [len(first), len(second), len(third)] == [TINY.asked, TINY.asked + TURN, TINY.asked + 2 * TURN]
        assert second[:TURN] == [*first, *[ANSWER] * TINY.answered]
        assert third[: 2 * TURN] == [*second, *[ANSWER] * TINY.answered]
        turns = find_turns(third, TurnMarkers(START, END))
        assert turns == [(number * TURN, number * TURN + TINY.asked) for number in range(3)]
    assert variant.calls[0][0][0] != variant.calls[0][0][1]


def test_times_are_means_over_conversations_and_tokens_are_those_not_cached() -> None:
    found = talk(FakeVariant(), TINY, 2, 3, ())
    # The second of two prompts waits a second longer than the first.
    assert found.ttfts == [1.5] * 3
    lengths = [TINY.asked + number * TURN for number in range(3)]
    cached = [0, *((length + TINY.answered - 1) // BLOCK * BLOCK for length in lengths[:2])]
    assert found.computed == 2 * (sum(lengths) - sum(cached))


def test_every_repeat_has_new_contents() -> None:
    variant = FakeVariant("parade", ("a", "b"))
    one, two = conversations(measured_of(variant))
    assert [record["conversations"] for record in (one, two)] == list(TINY.conversations)
    assert [record["variant"] for record in (one, two)] == ["parade"] * 2
    assert one["ttft_sum_ms_all"] == [3000.0] * 3
    assert two["ttft_sum_ms"] == pytest.approx(4500)
    assert two["ttft_last_ms"] == pytest.approx(1500)
    assert two["ttft_ms_by_turn"] == [1500] * 3
    # No repeat reuses the cache of another one.
    assert len(set(two["computed_tokens_all"])) == 1
    assert two["computed_tokens"] == 2 * one["computed_tokens"]
    assert all(requests == ["a", "b"] for _, requests in variant.calls)
    assert two["fits_cache"]


def test_a_crowd_is_held_once() -> None:
    (record,) = crowd(measured_of(FakeVariant()))
    assert (record["workload"], record["conversations"]) == ("conversations", TINY.crowd)
    assert len(record["computed_tokens_all"]) == 1


def test_whole_prompts_are_for_parade_alone() -> None:
    assert not list(whole(measured_of(FakeVariant("lora", ("a",)))))
    variant = FakeVariant("parade", ("a", "b"))
    records = list(whole(measured_of(variant)))
    assert [record["variant"] for record in records] == ["parade-whole"] * 2
    assert variant.calls[-1][1] == ["whole a", "whole b"]


def test_tenants_share_a_document() -> None:
    variant = FakeVariant("parade", ("a", "b"))
    share(variant, TINY, 64)
    prompts = [prompt for (prompt,), _ in variant.calls]
    assert [requests for _, requests in variant.calls] == [["a"], ["b"], ["a"]]
    assert all(prompt[:64] == prompts[0][:64] for prompt in prompts)
    assert all(find_turns(prompt, TurnMarkers(START, END)) == [(64, 64 + TINY.question)] for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == TINY.sharing


def test_first_tenant_and_later_ones_are_told_apart() -> None:
    records = list(documents(measured_of(FakeVariant())))
    assert [record["document"] for record in records] == list(TINY.documents)
    for record in records:
        assert len(record["first_ms_all"]) == 3
        assert len(record["ttft_ms_all"]) == 3 * (TINY.sharing - 1)
        assert record["computed_tokens"] == record["document"] % BLOCK + TINY.question
