# SPDX-License-Identifier: Apache-2.0
"""A worker's adapters in host memory and in slots, with fake adapters and layers."""

from types import SimpleNamespace

import pytest
import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, initial_generator
from vllm_parade.worker.slots import AdapterSlots

CONFIG = AdapterConfig()
SHAPE = BaseModelShape(64, 2, {"q": 64, "k": 64, "v": 64, "gate": 96, "up": 96})


class FakeLayer:
    """Shards whose biases hold one number: the code of the adapter's name."""

    table = torch.empty(1, SHAPE.output_width(CONFIG.sites))

    def shard(self, adapter, shape):
        assert shape is SHAPE
        weights = initial_generator(adapter.config, SHAPE)
        weights.bias.fill_(ord(adapter.content_hash))
        return weights


def make_slots(device="cpu", names="abcd"):
    """2 slots; the named adapters are in host memory."""
    slots = AdapterSlots(2, [FakeLayer(), FakeLayer()], SHAPE, 16, torch.device(device), torch.float32)
    for name in names:
        slots.add(SimpleNamespace(content_hash=name, config=CONFIG))
    return slots


@pytest.fixture
def slots():
    return make_slots()


def held(slots, slot):
    """Name of the adapter whose weights are in a slot; all layers hold the same."""
    layout = slots.host["d"].layout
    codes = {int(code) for layer in range(2) for code in layout.views(slots.flat[slot], layer).bias}
    (code,) = codes
    return chr(code)


def test_host_memory_alone_takes_no_slot(slots):
    assert slots.contents == [None, None]
    assert list(slots.host) == list("abcd")


def test_a_slot_holds_what_the_plan_says(slots):
    for step in ({"a": 0}, {"a": 0, "b": 1}, {}, {"c": 0}, {"b": 1, "d": 0}):
        slots.activate(step)
        for name, slot in step.items():
            assert (held(slots, slot), slots.contents[slot]) == (name, name)


def test_upcoming_adapters_are_in_their_slot_before_their_step(slots, monkeypatch):
    slots.activate({"a": 0})
    slots.prefetch({"b": 1})
    assert (held(slots, 0), held(slots, 1)) == ("a", "b")
    monkeypatch.setattr(slots, "_copy", lambda adapters: pytest.fail("copied again") if adapters else None)
    slots.activate({"a": 0, "b": 1})
    slots.prefetch({"b": 1})


def test_a_slot_that_holds_another_adapter_is_never_read(slots):
    """A copy that the scheduler expects may be missing: the request was aborted and its adapter removed."""
    slots.activate({"a": 0})
    slots.remove("b")
    slots.prefetch({"b": 1, "c": 0})
    assert slots.contents == ["c", None]
    slots.add(SimpleNamespace(content_hash="b", config=CONFIG))
    slots.activate({"a": 0, "b": 1})
    assert (held(slots, 0), held(slots, 1)) == ("a", "b")


def test_an_adapter_that_was_never_loaded_is_an_error(slots):
    slots.activate({"a": 0})
    with pytest.raises(KeyError, match="unheard of"):
        slots.activate({"unheard of": 0})
    assert slots.contents == ["a", None]


def test_remove_frees_host_memory(slots):
    slots.activate({"a": 0})
    for name in ("a", "b", "b", "unheard of"):
        slots.remove(name)
    assert list(slots.host) == list("cd")
    # Equal content is the same adapter.
    assert (held(slots, 0), slots.contents[0]) == ("a", "a")


@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_a_copy_waits_for_the_step_that_reads_the_slot():
    slots = make_slots("cuda")
    read = torch.zeros(2, device="cuda")
    for number, name in enumerate("ab"):
        slots.activate({name: 0})
        # The step sleeps before it reads the slot.
        torch.cuda._sleep(50_000_000)
        read[number] = slots.host[name].layout.views(slots.flat[0], 0).bias[0]
    assert read.tolist() == [ord("a"), ord("b")]


@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_a_step_waits_for_what_was_copied_while_the_last_one_ran():
    slots = make_slots("cuda")
    slots.activate({"a": 0})
    torch.cuda._sleep(50_000_000)
    # The copy waits for the sleeping step. A step on another stream, which does not sleep, reads the slot.
    slots.prefetch({"b": 1})
    with torch.cuda.stream(torch.cuda.Stream()):
        slots.activate({"b": 1})
        read = slots.host["b"].layout.views(slots.flat[1], 0).bias.clone()
        torch.cuda.current_stream().synchronize()
    assert (read == ord("b")).all()
