# SPDX-License-Identifier: Apache-2.0
"""Adapters on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_parade.adapter import GeneratorWeights
from vllm_parade.ops.packed import ABSENT, NUM_TENSORS, PackedGenerators, max_entries


class SlotWeights:
    """The generators of all slots, in all layers: one tensor on the device, allocated once and copied into.

    So memory is known before the first request, and CUDA graphs find weights at addresses that never change.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        hidden_size: int,
        width: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Room for `num_slots` adapters whose r is at most `max_rank`; `width` entries in a vector of all sites."""
        entries = max_entries(num_layers, hidden_size, width, max_rank)
        self.flat = torch.empty(num_slots, entries, device=device, dtype=dtype)
        self.offsets = torch.full((num_slots, num_layers, NUM_TENSORS), ABSENT, dtype=torch.int64, device=device)
        self.packed: list[PackedGenerators | None] = [None] * num_slots

    def __len__(self) -> int:
        """Slots."""
        return len(self.flat)

    def put(self, slot: int, packed: PackedGenerators) -> None:
        """Copy an adapter into a slot; from pinned memory the host does not wait for it.

        A step in flight still finds what it was planned with: the copy waits for it in the order of the stream.
        """
        self.flat[slot, : len(packed.flat)].copy_(packed.flat, non_blocking=True)
        self.offsets[slot].copy_(packed.offsets, non_blocking=True)
        self.packed[slot] = packed

    def of_layer(self, number: int) -> "LayerGenerators":
        """What one layer reads; `number` counts the layers of this worker."""
        return LayerGenerators(self, number, self.flat, self.offsets[:, number])


@dataclass(frozen=True)
class LayerGenerators:
    """One layer's generators in all slots."""

    slots: SlotWeights
    number: int
    flat: Tensor
    """[slots, entries]"""
    offsets: Tensor
    """[slots, NUM_TENSORS] int64: where this layer's tensors begin in `flat`"""

    def generator(self, slot: int) -> GeneratorWeights | None:
        """The generator in a slot; None if its adapter leaves this layer alone."""
        packed = self.slots.packed[slot]
        assert packed is not None, f"slot {slot} is empty"
        return packed.generator(self.number, self.flat[slot])
