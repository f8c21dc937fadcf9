# SPDX-License-Identifier: Apache-2.0
"""Adapters in host memory, and the few that hold a slot on the device."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vllm_parade.adapter import Adapter, AdapterConfig, BaseModelShape
from vllm_parade.layers import ParadeLayer, SlotWeights
from vllm_parade.ops.packed import PackedGenerators


@dataclass(frozen=True)
class HostAdapter:
    """An adapter in host memory: this rank's part, in the model's dtype."""

    config: AdapterConfig
    packed: PackedGenerators


class AdapterSlots:
    """Two tiers, both keyed by content hash: host memory, filled by request, and slots on the device, an LRU cache."""

    def __init__(self, layers: Sequence[ParadeLayer], shape: BaseModelShape, weights: SlotWeights) -> None:
        self.layers = layers
        self.shape = shape
        self.weights = weights
        self.host: dict[str, HostAdapter] = {}
        self.device: OrderedDict[str, int] = OrderedDict()

    def add(self, adapter: Adapter) -> None:
        """Hold an adapter in host memory.

        Raises:
            AdapterError: the model's dtype cannot hold it; nothing has changed.
        """
        generators = [layer.shard(adapter, self.shape) for layer in self.layers]
        flat = self.weights.flat
        packed = PackedGenerators.pack(generators, flat.dtype, pin=flat.is_cuda)
        self.host[adapter.content_hash] = HostAdapter(adapter.config, packed)

    def remove(self, content_hash: str) -> None:
        """Forget an adapter. What it left in its slot stays there, unread, until the slot is taken."""
        self.host.pop(content_hash, None)
        self.device.pop(content_hash, None)

    def activate(self, content_hashes: Collection[str]) -> dict[str, int]:
        """Give all these adapters a slot, together, taking the least recently used ones of others.

        Returns:
            slot of each

        Raises:
            KeyError: an adapter is not in host memory. The front end loads adapters before their first request.
        """
        assert len(content_hashes) <= len(self.weights), f"{len(content_hashes)} adapters for {len(self.weights)} slots"
        for content_hash in content_hashes:
            if content_hash in self.device:
                self.device.move_to_end(content_hash)
        for content_hash in content_hashes:
            if content_hash not in self.device:
                self._activate(content_hash, self.host[content_hash])
        return {content_hash: self.device[content_hash] for content_hash in content_hashes}

    def _activate(self, content_hash: str, adapter: HostAdapter) -> None:
        free = set(range(len(self.weights))) - set(self.device.values())
        slot = min(free) if free else self.device.popitem(last=False)[1]
        self.weights.put(slot, adapter.packed)
        self.device[content_hash] = slot
