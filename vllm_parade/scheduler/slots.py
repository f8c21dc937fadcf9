# SPDX-License-Identifier: Apache-2.0
"""The adapter slots. A slot holds the generators of one adapter on the device, on every worker."""

from collections import OrderedDict
from collections.abc import Collection


class SlotCache:
    """Maps adapters to slots, as an LRU cache.

    An adapter needs its slot only in the steps in which it reads instructions. The step's plan names the slot, so all
    workers use the same one.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self.num_slots = num_slots

    def __contains__(self, adapter: str) -> bool:
        """Whether an adapter has a slot."""
        return adapter in self._slots

    def activate(self, adapters: Collection[str]) -> dict[str, int]:
        """Give each of these adapters a slot. Evicts the least recently used other adapters.

        Returns:
            the slot of each adapter
        """
        assert len(adapters) <= self.num_slots, f"{len(adapters)} adapters for {self.num_slots} slots"
        # Adapters that have a slot come first, so that no other adapter of this call evicts them.
        for adapter in adapters:
            if adapter in self._slots:
                self._slots.move_to_end(adapter)
        for adapter in adapters:
            if adapter not in self._slots:
                self._slots[adapter] = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        return {adapter: self._slots[adapter] for adapter in adapters}
