# SPDX-License-Identifier: Apache-2.0
"""Which adapter has which slot."""

import pytest

from vllm_parade.scheduler.slots import SlotCache


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        (["a"], "a"),
        (["a", "a"], "a"),
        (["a", "b"], "ab"),
        (["ab"], "ab"),
        # The least recently used one goes.
        (["a", "b", "c"], "bc"),
        (["a", "b", "a", "c"], "ac"),
        (["ab", "", "c", "d"], "cd"),
        # A step's adapters are activated together: b stays although a was used later.
        (["b", "a", "bc"], "bc"),
        (["b", "a", "cb"], "bc"),
        (["ab", "cd"], "cd"),
    ],
)
def test_the_least_recently_used_adapter_loses_its_slot(steps, left):
    slots = SlotCache(2)
    for step in steps:
        taken = slots.activate(step)
        assert list(taken) == list(step)
        assert len(set(taken.values())) == len(step)
        assert slots.activate(step) == taken
    assert [name for name in "abcd" if name in slots] == list(left)


def test_an_adapter_keeps_its_slot():
    slots = SlotCache(3)
    first = slots.activate("ab")
    assert slots.activate("cab") == {"c": 2, **first}
    assert slots.activate("d") == {"d": first["a"]}


def test_more_adapters_than_slots_is_a_bug_of_the_scheduler():
    with pytest.raises(AssertionError, match="3 adapters for 2 slots"):
        SlotCache(2).activate("abc")
