# SPDX-License-Identifier: Apache-2.0
"""Which adapters hold a slot, with fakes for adapters and layers."""

from types import SimpleNamespace

import pytest
import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, initial_generator
from vllm_parade.worker.slots import AdapterSlots

SHAPE = object()
CONFIG = AdapterConfig()
MODEL = BaseModelShape(8, 2, {"q": 8, "k": 8, "v": 8, "gate": 8, "up": 8})


class FakeLayer:
    """Shards of one number: the code of the adapter's name."""

    def shard(self, adapter, shape):
        assert shape is SHAPE
        weights = initial_generator(adapter.config, MODEL)
        weights.bias.fill_(ord(adapter.content_hash))
        return weights


class FakeWeights:
    """Remembers what each slot holds."""

    def __init__(self, num_slots):
        self.flat = torch.empty(num_slots, 0)
        self.hidden_size, self.width = MODEL.hidden_size, MODEL.output_width(CONFIG.sites)
        self.names = [""] * num_slots

    def __len__(self):
        return len(self.names)

    def exchange(self, adapters, read):
        self.read = set(read)
        self.copy_ahead(adapters)

    def copy_ahead(self, adapters):
        for slot, packed in adapters.items():
            biases = [packed.layout.views(packed.flat, layer).bias for layer in range(2)]
            self.names[slot] = "".join(chr(int(bias[0])) for bias in biases)


@pytest.fixture
def slots():
    """2 slots; a to d are in host memory."""
    slots = AdapterSlots([FakeLayer(), FakeLayer()], SHAPE, FakeWeights(2))
    for name in "abcd":
        slots.add(SimpleNamespace(content_hash=name, config=CONFIG))
    return slots


def on_device(slots):
    """Names that hold a slot; all layers hold the same in it."""
    for name, slot in slots.device.items():
        assert slots.weights.names[slot] == 2 * name
    return "".join(sorted(slots.device))


def test_host_memory_alone_takes_no_slot(slots):
    assert on_device(slots) == ""
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
def test_least_recently_used_goes(slots, steps, left):
    for step in steps:
        taken = slots.activate(list(step))
        assert slots.weights.read == set(taken.values())
        assert set(step) <= set(on_device(slots))
    assert on_device(slots) == left


def test_upcoming_ones_have_their_slot_before_their_step(slots):
    taken = slots.activate(["a"])
    slots.prefetch(["b"])
    assert slots.weights.read == set(taken.values())
    assert on_device(slots) == "ab"
    # Both stay as long as they are wanted; c takes the slot of a, which no step reads any more.
    slots.activate(["a"])
    slots.prefetch(["b"])
    assert on_device(slots) == "ab"
    slots.activate([])
    slots.prefetch(["b", "c"])
    assert on_device(slots) == "bc"


def test_upcoming_ones_that_are_gone_are_passed_over(slots):
    slots.remove("b")
    slots.activate(["a"])
    slots.prefetch(["b"])
    assert on_device(slots) == "a"


def test_more_than_there_are_slots_is_a_bug_of_the_scheduler(slots):
    with pytest.raises(AssertionError, match="3 adapters for 2 slots"):
        slots.activate(["a", "b", "c"])


def test_what_was_never_loaded_is_an_error(slots):
    slots.activate(["a"])
    with pytest.raises(KeyError, match="unheard of"):
        slots.activate(["unheard of"])
    assert on_device(slots) == "a"


def test_remove_takes_the_slot_too(slots):
    slots.activate(["a", "b"])
    slots.remove("a")
    assert on_device(slots) == "b"
    assert "a" not in slots.host
    slots.activate(["c"])
    assert on_device(slots) == "bc"


def test_remove_of_what_has_no_slot(slots):
    slots.activate(["a"])
    slots.remove("b")
    slots.remove("b")
    slots.remove("unheard of")
    assert on_device(slots) == "a"
    assert list(slots.host) == list("acd")


def test_the_same_content_twice_is_one_adapter(slots):
    slots.activate(["a"])
    slots.add(SimpleNamespace(content_hash="a", config=CONFIG))
    slots.activate(["a"])
    assert on_device(slots) == "a"
