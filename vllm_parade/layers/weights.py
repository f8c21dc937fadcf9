# SPDX-License-Identifier: Apache-2.0
"""Adapters on the device."""

from collections.abc import Collection, Mapping

import torch

from vllm_parade.ops.packed import PackedGenerators, max_entries


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
        self.hidden_size, self.width, self.max_rank = hidden_size, width, max_rank
        entries = max_entries(num_layers, hidden_size, width, max_rank)
        self.flat = torch.empty(num_slots, entries, device=device, dtype=dtype)
        # Copies run beside the step that computes: on a stream of their own, with an event of what last read a slot,
        # and one of what was copied into it and nobody has read yet.
        self._copies = torch.cuda.Stream(device) if self.flat.is_cuda else None
        self._last_read: list[torch.Event | None] = [None] * num_slots
        self._copied: dict[int, torch.Event] = {}
        self._read_by_last_step: Collection[int] = ()

    def __len__(self) -> int:
        """Slots."""
        return len(self.flat)

    def exchange(self, adapters: Mapping[int, PackedGenerators], read: Collection[int]) -> None:
        """Before a step is queued: copy adapters into slots. The host waits for nothing.

        A copy waits for the steps that read what stood in its slot; the step waits for the copies that it reads, also
        those made ahead.

        Args:
            adapters: what to copy, by slot, from pinned memory
            read: slots that the step reads
        """
        if self._copies is None:
            for slot, packed in adapters.items():
                self._copy(slot, packed)
            return
        compute = torch.cuda.current_stream()
        if self._read_by_last_step:
            queued = compute.record_event()
            for slot in self._read_by_last_step:
                self._last_read[slot] = queued
        self._read_by_last_step = read
        with torch.cuda.stream(self._copies if adapters else None):
            for slot, packed in adapters.items():
                event = self._last_read[slot]
                if event is not None:
                    self._copies.wait_event(event)
                self._copy(slot, packed)
        for slot in read:
            if slot in self._copied:
                compute.wait_event(self._copied.pop(slot))

    def copy_ahead(self, adapters: Mapping[int, PackedGenerators]) -> None:
        """When a step's inputs are queued: copy adapters that later steps read, in this order, into slots that this
        one does not read. The host waits for nothing.

        The copies wait until the step has its inputs, and so for the steps before it. They are large, and inputs,
        small, would stand behind them on their way to the device, with the whole step.
        """
        if not adapters:
            return
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            for slot, packed in adapters.items():
                self._copy(slot, packed)

    def _copy(self, slot: int, packed: PackedGenerators) -> None:
        self.flat[slot, : len(packed.flat)].copy_(packed.flat, non_blocking=True)
        if self._copies is not None:
            self._copied[slot] = self._copies.record_event()
