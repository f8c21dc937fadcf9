# SPDX-License-Identifier: Apache-2.0
"""Adapters in host memory, and the few that hold a slot on the device."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from vllm_parade.adapter import Adapter, BaseModelShape
from vllm_parade.layers import ParadeLayer, SlotWeights
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators


class AdapterSlots:
    """Two tiers, both keyed by content hash: host memory, filled by request, and slots on the device, an LRU cache."""

    def __init__(self, layers: Sequence[ParadeLayer], shape: BaseModelShape, weights: SlotWeights) -> None:
        self.layers = layers
        self.shape = shape
        self.weights = weights
        self.host: dict[str, PackedGenerators] = {}
        """This rank's part of each adapter, in the model's dtype."""
        self.device: OrderedDict[str, int] = OrderedDict()

    @property
    def device_bytes(self) -> int:
        """Device memory of all slots."""
        return self.weights.flat.nbytes

    def add(self, adapter: Adapter) -> None:
        """Hold an adapter in host memory.

        Raises:
            AdapterError: the model's dtype cannot hold it; nothing has changed.
        """
        generators = [layer.shard(adapter, self.shape) for layer in self.layers]
        layout = GeneratorLayout.of(adapter.config, self.weights.hidden_size, self.weights.width)
        flat = self.weights.flat
        self.host[adapter.content_hash] = PackedGenerators.pack(layout, generators, flat.dtype, pin=flat.is_cuda)

    def remove(self, content_hash: str) -> None:
        """Forget an adapter. What it left in its slot stays there, unread, until the slot is taken."""
        self.host.pop(content_hash, None)
        self.device.pop(content_hash, None)

    def activate(self, content_hashes: Collection[str]) -> dict[str, int]:
        """Give all adapters that a step reads a slot, together, taking the least recently used ones of others.

        Returns:
            slot of each

        Raises:
            KeyError: an adapter is not in host memory. The front end loads adapters before their first request.
        """
        assert len(content_hashes) <= len(self.weights), f"{len(content_hashes)} adapters for {len(self.weights)} slots"
        new = self._take_slots(content_hashes)
        slots = {content_hash: self.device[content_hash] for content_hash in content_hashes}
        self.weights.exchange(new, slots.values())
        return slots

    def prefetch(self, upcoming: Sequence[str]) -> None:
        """Give adapters a slot that later steps will read, the next one first; they fit beside those of this step,
        whose inputs are queued. One that is not in host memory any more, since its request was aborted, is passed over.
        """
        self.weights.copy_ahead(self._take_slots([name for name in upcoming if name in self.host]))

    def _take_slots(self, content_hashes: Collection[str]) -> dict[int, PackedGenerators]:
        """What must be copied so that all these adapters are on the device, by slot."""
        for content_hash in content_hashes:
            if content_hash in self.device:
                self.device.move_to_end(content_hash)
        missing = {name: self.host[name] for name in content_hashes if name not in self.device}
        return {self._take_slot(content_hash): packed for content_hash, packed in missing.items()}

    def _take_slot(self, content_hash: str) -> int:
        free = set(range(len(self.weights))) - set(self.device.values())
        slot = min(free) if free else self.device.popitem(last=False)[1]
        self.device[content_hash] = slot
        return slot
