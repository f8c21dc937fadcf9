# SPDX-License-Identifier: Apache-2.0
"""The adapters that a worker holds: all of them in host memory, those that the scheduler has given a slot on the device
too."""

from collections.abc import Collection, Mapping, Sequence

import torch

from vllm_parade.adapter import Adapter, BaseModelShape
from vllm_parade.layers import ParadeLayer
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators, max_entries


class AdapterSlots:
    """Host memory is filled on request of the front end, slots as the scheduler's plans say.

    The slots are one tensor, allocated once and copied into. So memory is known before the first request, and CUDA
    graphs find weights at addresses that never change.
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
        """Room for `num_slots` adapters whose r is at most `max_rank`."""
        self.layers, self.shape = layers, shape
        self.width = layers[0].table.shape[1]
        entries = max_entries(len(layers), shape.hidden_size, self.width, max_rank)
        self.flat = torch.empty(num_slots, entries, device=device, dtype=dtype)
        """[slots, entries]"""
        self.host: dict[str, PackedGenerators] = {}
        """This rank's part of each adapter in the model's dtype, by content hash."""
        self.contents: list[str | None] = [None] * num_slots
        """Content hash of the adapter in each slot. No step reads a slot that holds another adapter."""
        # Copies run beside the step that computes: on a stream of their own, with an event of what last read a slot,
        # and one of what was copied into it and nobody has read yet.
        self._copies = torch.cuda.Stream(device) if self.flat.is_cuda else None
        self._last_read: list[torch.Event | None] = [None] * num_slots
        self._copied: dict[int, torch.Event] = {}
        self._read_by_last_step: Collection[int] = ()

    @property
    def device_bytes(self) -> int:
        """Device memory of all slots."""
        return self.flat.nbytes

    def add(self, adapter: Adapter) -> None:
        """Hold an adapter in host memory.

        Raises:
            AdapterError: the model's dtype cannot hold it; nothing has changed.
        """
        generators = [layer.shard(adapter, self.shape) for layer in self.layers]
        layout = GeneratorLayout.of(adapter.config, self.shape.hidden_size, self.width)
        packed = PackedGenerators.pack(layout, generators, self.flat.dtype, pin=self.flat.is_cuda)
        self.host[adapter.content_hash] = packed

    def remove(self, content_hash: str) -> None:
        """Free an adapter's host memory. Its slot keeps the copy until another adapter gets the slot."""
        self.host.pop(content_hash, None)

    def activate(self, slots: Mapping[str, int]) -> None:
        """Before a step is queued: copy what the step reads into the slots that do not hold it yet.

        The host waits for nothing. A copy waits for the steps that read what was in its slot before; the step waits
        for the copies that it reads, also those made by `prefetch`.

        Args:
            slots: slot of each adapter that the step reads, by content hash

        Raises:
            KeyError: an adapter is not in host memory. The front end loads adapters before their first request.
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
        """When a step's inputs are queued: copy adapters that later steps read into slots that this step does not read.

        The host waits for nothing. The copies wait until the step has its inputs, and so for the steps before it: they
        are large, and inputs, which are small, would wait behind them, with the whole step.

        Args:
            slots: slot of each adapter, the one that is needed first being the first. An adapter that is not in host
                memory any more, since its request was aborted, is passed over.
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
