# SPDX-License-Identifier: Apache-2.0
"""Adapters are copied into slots, and never under the feet of a step that reads them."""

import pytest
import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, initial_generator
from vllm_parade.layers import SlotWeights
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators

CONFIG = AdapterConfig()
SHAPE = BaseModelShape(64, 2, {"q": 64, "k": 64, "v": 64, "gate": 96, "up": 96})
WIDTH = SHAPE.output_width(CONFIG.sites)


def slots_on(device):
    return SlotWeights(2, SHAPE.num_layers, SHAPE.hidden_size, WIDTH, 16, torch.device(device), torch.float32)


def packed(value, *, pin=False):
    weights = [initial_generator(CONFIG, SHAPE) for _ in range(SHAPE.num_layers)]
    for one in weights:
        one.bias.fill_(value)
    layout = GeneratorLayout.of(CONFIG, SHAPE.hidden_size, WIDTH)
    return PackedGenerators.pack(layout, weights, torch.float32, pin=pin)


def test_a_slot_holds_what_was_copied_last():
    slots, adapters = slots_on("cpu"), [packed(2), packed(3), packed(4)]
    assert len(slots) == 2
    slots.exchange({0: adapters[0], 1: adapters[1]}, [0, 1])
    slots.copy_ahead({0: adapters[2]})
    slots.exchange({}, [0])
    for slot, value in ((0, 4), (1, 3)):
        for layer in range(SHAPE.num_layers):
            assert (adapters[0].layout.views(slots.flat[slot], layer).bias == value).all()


@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_a_copy_waits_for_the_step_that_reads_the_slot():
    slots, adapters = slots_on("cuda"), [packed(2, pin=True), packed(3, pin=True)]
    read = torch.zeros(2, device="cuda")
    for number, adapter in enumerate(adapters):
        slots.exchange({0: adapter}, [0])
        # A step that takes its time before it reads.
        torch.cuda._sleep(50_000_000)
        read[number] = adapter.layout.views(slots.flat[0], 0).bias[0]
    assert read.tolist() == [2, 3]


@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_a_step_waits_for_what_was_copied_ahead_of_it():
    slots, adapters = slots_on("cuda"), [packed(value, pin=True) for value in (2, 3)]
    slots.exchange({0: adapters[0]}, [0])
    torch.cuda._sleep(50_000_000)
    # The copy waits for the step that sleeps; another step, which does not, reads it.
    slots.copy_ahead({1: adapters[1]})
    with torch.cuda.stream(torch.cuda.Stream()):
        slots.exchange({}, [1])
        read = adapters[1].layout.views(slots.flat[1], 0).bias.clone()
        torch.cuda.current_stream().synchronize()
    assert (read == 3).all()
