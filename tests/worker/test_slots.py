# SPDX-License-Identifier: Apache-2.0
"""Which adapters hold a slot, with fakes for adapters and layers."""

from types import SimpleNamespace

import pytest

from vllm_parade.worker.slots import AdapterSlots

SHAPE = object()


class FakeLayer:
    def __init__(self):
        self.generators = []

    def activate(self, adapter, shape):
        assert shape is SHAPE
        assert adapter.content_hash not in self.generators
        self.generators.append(adapter.content_hash)

    def deactivate(self, content_hash):
        self.generators.remove(content_hash)


@pytest.fixture
def layers():
    return [FakeLayer(), FakeLayer()]


@pytest.fixture
def slots(layers):
    """2 slots; a to d are in host memory."""
    slots = AdapterSlots(layers, SHAPE, num_slots=2)
    for name in "abcd":
        slots.add(SimpleNamespace(content_hash=name))
    return slots


def on_device(layers):
    first, second = layers
    assert sorted(first.generators) == sorted(second.generators)
    return "".join(sorted(first.generators))


def test_host_memory_alone_takes_no_slot(slots, layers):
    assert on_device(layers) == ""
    assert list(slots.host) == list("abcd")


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
        # Those of one step come together: b, though older than a, stays.
        (["b", "a", "bc"], "bc"),
        (["b", "a", "cb"], "bc"),
        (["ab", "cd"], "cd"),
    ],
)
def test_least_recently_used_goes(slots, layers, steps, left):
    for step in steps:
        slots.activate(list(step))
        assert set(step) <= set(on_device(layers))
    assert on_device(layers) == left


def test_more_than_there_are_slots_is_a_bug_of_the_scheduler(slots):
    with pytest.raises(AssertionError, match="3 adapters for 2 slots"):
        slots.activate(["a", "b", "c"])


def test_what_was_never_loaded_is_an_error(slots, layers):
    slots.activate(["a"])
    with pytest.raises(KeyError, match="unheard of"):
        slots.activate(["unheard of"])
    assert on_device(layers) == "a"


def test_remove_takes_the_slot_too(slots, layers):
    slots.activate(["a", "b"])
    slots.remove("a")
    assert on_device(layers) == "b"
    assert "a" not in slots.host
    slots.activate(["c"])
    assert on_device(layers) == "bc"


def test_remove_of_what_has_no_slot(slots, layers):
    slots.activate(["a"])
    slots.remove("b")
    slots.remove("b")
    slots.remove("unheard of")
    assert on_device(layers) == "a"
    assert list(slots.host) == list("acd")


def test_the_same_content_twice_is_one_adapter(slots, layers):
    slots.activate(["a"])
    slots.add(SimpleNamespace(content_hash="a"))
    slots.activate(["a"])
    assert on_device(layers) == "a"
