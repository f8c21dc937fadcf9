# SPDX-License-Identifier: Apache-2.0
"""The adapters of a worker: all in host memory, and those that have a slot also on the device."""

from collections.abc import Collection, Mapping, Sequence

import torch

from vllm_parade.adapter import Adapter, BaseModelShape
from vllm_parade.layers import ParadeLayer
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators, max_entries


class AdapterSlots:
    """The front end decides which adapters are in host memory; the scheduler's plans decide which are in slots.

    The slots are one tensor, allocated at startup. So device memory is known before the first request, and the weights'
    addresses never change, as CUDA graphs require.
    """

    def __init__(
        self,
        num_slots: int,
        layers: Sequence[ParadeLayer],
        shape: BaseModelShape,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate slots for `num_slots` adapters whose r is at most `max_rank`."""
        self.layers, self.shape = layers, shape
        self.width = layers[0].table.shape[1]
        entries = max_entries(len(layers), shape.hidden_size, self.width, max_rank)
        self.flat = torch.empty(num_slots, entries, device=device, dtype=dtype)
        """[slots, entries]"""
        self.host: dict[str, PackedGenerators] = {}
        """This rank's part of each adapter, in the model's dtype, by content hash."""
        self.contents: list[str | None] = [None] * num_slots
        """Content hash of the adapter in each slot. No step reads a slot that holds another adapter."""
        # Copies run on their own stream, while the current step computes. Each slot has an event of the last step that
        # read it, and one of the last copy into it until a step has waited for that copy.
        self._copies = torch.cuda.Stream(device) if self.flat.is_cuda else None
        self._last_read: list[torch.Event | None] = [None] * num_slots
        self._copied: dict[int, torch.Event] = {}
        self._read_by_last_step: Collection[int] = ()

    @property
    def device_bytes(self) -> int:
        """Device memory of all slots."""
        return self.flat.nbytes

    def add(self, adapter: Adapter) -> None:
        """Store an adapter in host memory.

        Raises:
            AdapterError: a weight overflows in the model's dtype. Nothing has changed.
        """
        generators = [layer.shard(adapter, self.shape) for layer in self.layers]
        layout = GeneratorLayout.of(adapter.config, self.shape.hidden_size, self.width)
        packed = PackedGenerators.pack(layout, generators, self.flat.dtype, pin=self.flat.is_cuda)
        self.host[adapter.content_hash] = packed

    def remove(self, content_hash: str) -> None:
        """Free an adapter's host memory. A copy in a slot stays until another adapter gets the slot."""
        self.host.pop(content_hash, None)

    def activate(self, slots: Mapping[str, int]) -> None:
        """Copy the adapters that a step reads into slots that do not hold them yet. Called before the step is queued.

        The host does not wait. A copy waits for the steps that read the slot's previous adapter. The step waits for the
        copies that it reads, including those of `prefetch`.

        Args:
            slots: slot of each adapter that the step reads, by content hash

        Raises:
            KeyError: an adapter is not in host memory. The front end should have loaded it before its first request.
        """
        new = {slot: self.host[name] for name, slot in slots.items() if self.contents[slot] != name}
        if self._copies is not None:
            compute = torch.cuda.current_stream()
            if self._read_by_last_step:
                queued = compute.record_event()
                for slot in self._read_by_last_step:
                    self._last_read[slot] = queued
            self._read_by_last_step = slots.values()
        self._copy(new)
        for name, slot in slots.items():
            self.contents[slot] = name
            if slot in self._copied:
                compute.wait_event(self._copied.pop(slot))

    def prefetch(self, slots: Mapping[str, int]) -> None:
        """Copy adapters of later steps into slots that this step does not read. Called once its inputs are queued.

        The host does not wait. The copies wait for the copies of the step's inputs, and so for all earlier steps.
        Otherwise the small inputs, and with them the step, would wait behind these large copies.

        Args:
            slots: slot of each adapter by content hash, in the order in which the adapters are needed. Adapters that
                are no longer in host memory, because their request was aborted, are skipped.
        """
        coming = {name: slot for name, slot in slots.items() if self.contents[slot] != name and name in self.host}
        if coming and self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
        self._copy({slot: self.host[name] for name, slot in coming.items()})
        for name, slot in coming.items():
            self.contents[slot] = name

    def _copy(self, adapters: Mapping[int, PackedGenerators]) -> None:
        with torch.cuda.stream(self._copies if adapters else None):
            for slot, packed in adapters.items():
                event = self._last_read[slot]
                if event is not None and self._copies is not None:
                    self._copies.wait_event(event)
                self.flat[slot, : len(packed.flat)].copy_(packed.flat, non_blocking=True)
                if self._copies is not None:
                    self._copied[slot] = self._copies.record_event()
