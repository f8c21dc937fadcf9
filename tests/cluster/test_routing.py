# SPDX-License-Identifier: Apache-2.0
"""The routing rule."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_parade.cluster import AffinityRule
from vllm_parade.cluster.routing import FREE, HOMES

NAMES = [f"replica{number}" for number in range(20)]
SLOTS = 32
ADAPTERS = [f"adapter{number}" for number in range(2000)]


def test_an_adapters_requests_meet() -> None:
    rule = AffinityRule(NAMES, SLOTS)
    idle = [0] * len(NAMES)
    places = {adapter: rule.choose(adapter, idle) for adapter in ADAPTERS}
    # A router with another seed makes the same choices.
    other = AffinityRule(NAMES, SLOTS, seed=5)
    assert places == {adapter: other.choose(adapter, idle) for adapter in ADAPTERS}
    assert (rule.home, rule.spread, rule.elsewhere) == (len(ADAPTERS), 0, 0)


def test_adapters_are_spread_evenly() -> None:
    rule = AffinityRule(NAMES, SLOTS)
    counts = Counter(rule.order(adapter)[0] for adapter in ADAPTERS)
    assert len(counts) == len(NAMES)
    # The mean is 100 per replica; the bounds are three standard deviations away.
    assert max(counts.values()) < 130
    assert min(counts.values()) > 70


@pytest.mark.parametrize("gone", [0, 7])
def test_a_replica_that_goes_moves_only_its_own(gone: int) -> None:
    before, left = AffinityRule(NAMES, SLOTS), [name for name in NAMES if name != NAMES[gone]]
    after = AffinityRule(left, SLOTS)
    for adapter in ADAPTERS[:300]:
        first, second = (NAMES[place] for place in before.order(adapter)[:2])
        # The second in the old order becomes the first. A popular adapter is already loaded there.
        assert left[after.order(adapter)[0]] == (second if first == NAMES[gone] else first)


def test_a_hot_adapter_spreads_in_its_own_order() -> None:
    rule, loads = AffinityRule(NAMES, SLOTS), [0] * len(NAMES)
    order = rule.order("hot")
    for _ in range(3 * FREE):
        loads[rule.choose("hot", loads)] += 1
    assert [loads[place] for place in order[:4]] == [FREE, FREE, FREE, 0]
    assert (rule.home, rule.spread, rule.elsewhere) == (FREE, 2 * FREE, 0)


def test_an_engine_that_is_full_is_busy_while_others_have_room() -> None:
    rule = AffinityRule(NAMES, SLOTS)
    assert rule.capacity(len(NAMES) * 30) == SLOTS
    # If all are full, requests wait anywhere, so the limit rises above SLOTS and adapters keep to their replicas.
    assert rule.capacity(len(NAMES) * 40) == 50
    assert rule.capacity(0) == FREE


def test_where_all_its_replicas_are_busy_the_others_help() -> None:
    rule, loads = AffinityRule(NAMES, SLOTS), [0] * len(NAMES)
    for place in rule.order("hot"):
        loads[place] = 50
    chosen = {rule.choose("hot", loads) for _ in range(100)}
    assert rule.elsewhere == 100
    # The less busy of two random replicas gets it. Only if both are among its eight is a busy one chosen.
    assert len(chosen - set(rule.order("hot"))) > 5


def test_requests_of_the_base_model_go_where_there_is_room() -> None:
    rule, loads = AffinityRule(NAMES, SLOTS), [0] * len(NAMES)
    for _ in range(10 * len(NAMES)):
        loads[rule.choose(None, loads)] += 1
    assert max(loads) - min(loads) <= 5
    assert (rule.home, rule.spread, rule.elsewhere) == (0, 0, 0)


@pytest.mark.parametrize("adapter", ["any", None])
def test_a_conversation_stays_until_its_replica_is_busy(adapter: str | None) -> None:
    rule, loads = AffinityRule(NAMES, SLOTS), [0] * len(NAMES)
    order = rule.order("any")
    # Not one of the adapter's replicas, so only the conversation explains this choice.
    (kept, *_) = set(range(len(NAMES))) - set(order)
    loads[kept] = FREE - 1
    assert {rule.choose(adapter, loads, kept=kept) for _ in range(50)} == {kept}
    loads[kept] = FREE
    left = {rule.choose(adapter, loads, kept=kept) for _ in range(50)}
    assert left == {order[0]} if adapter else len(left) > 5  # by chance
    # If all replicas have many requests, it takes more to be busy.
    loads = [SLOTS // 2] * len(NAMES)
    assert rule.choose(adapter, loads, kept=kept) == kept
    loads[kept] = SLOTS
    assert rule.choose("any", loads, kept=kept) == order[0]


def test_without_a_conversation_the_rule_is_as_before() -> None:
    one, other = AffinityRule(NAMES, SLOTS), AffinityRule(NAMES, SLOTS)
    loads = [number % 7 for number in range(len(NAMES))]
    for adapter in [*ADAPTERS[:50], None]:
        assert one.choose(adapter, loads, kept=None) == other.choose(adapter, loads)
    # Requests that stay with their conversation are not counted.
    before = (one.home, one.spread, one.elsewhere)
    one.choose(ADAPTERS[0], [0] * len(NAMES), kept=3)
    assert (one.home, one.spread, one.elsewhere) == before


def test_there_must_be_a_replica() -> None:
    with pytest.raises(ValueError, match="no replica"):
        AffinityRule([], SLOTS)
    assert AffinityRule(["only"], SLOTS).choose("any", [99]) == 0


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.text(max_size=5))
def test_nobody_is_sent_where_it_is_clearly_busier(loads: list[int], adapter: str) -> None:
    rule = AffinityRule([f"r{number}" for number in range(len(loads))], SLOTS)
    place, capacity = rule.choose(adapter, loads), rule.capacity(sum(loads))
    assert 0 <= place < len(loads)
    assert len(rule.order(adapter)) == min(HOMES, len(loads))
    if rule.elsewhere:
        assert all(loads[home] >= capacity for home in rule.order(adapter))
    else:
        assert loads[place] < capacity
