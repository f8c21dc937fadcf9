# SPDX-License-Identifier: Apache-2.0
"""Packs an adapter's generators into one flat tensor, which one copy moves to the device. Needs no Triton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_parade.adapter import AdapterConfig, GeneratorWeights
from vllm_parade.adapter.weights import shapes_for_sizes

# Every tensor begins at a multiple of this many entries (32 bytes or more), so kernels can use wide loads.
ALIGNMENT = 16


@dataclass(frozen=True)
class GeneratorLayout:
    """Positions of the tensors of one layer's generator. All layers of an adapter have the same layout."""

    config: AdapterConfig
    shapes: dict[str, tuple[int, ...]]
    """Shapes by checkpoint name."""
    offsets: dict[str, int]
    """First entry of each tensor, relative to the layer's first entry."""
    size: int
    """Entries per layer."""

    @classmethod
    def of(cls, config: AdapterConfig, hidden_size: int, width: int) -> "GeneratorLayout":
        """Layout for vectors of `width` entries, which may include sites that the adapter does not scale."""
        shapes, offsets, end = shapes_for_sizes(config, hidden_size, width), {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += _aligned(math.prod(shape))
        return cls(config, shapes, offsets, end)

    def views(self, flat: Tensor, layer: int) -> GeneratorWeights:
        """A layer's generator, as views of a flat tensor."""
        start = layer * self.size
        return GeneratorWeights.from_named_tensors(
            {name: _view(flat[start + offset :], name, self.shapes[name]) for name, offset in self.offsets.items()}
        )


@dataclass(frozen=True)
class PackedGenerators:
    """The generators of all layers of one adapter."""

    layout: GeneratorLayout
    flat: Tensor
    """[layers * layout.size]"""

    @classmethod
    def pack(
        cls, layout: GeneratorLayout, generators: Sequence[GeneratorWeights | None], dtype: torch.dtype, *, pin: bool
    ) -> "PackedGenerators":
        """Pack the generators of all layers. `pin` page-locks the tensor, for asynchronous copies to the device.

        A layer without a generator gets zero weights and a bias of one, so its vectors are exactly one.
        """
        flat = torch.zeros(len(generators) * layout.size, dtype=dtype, pin_memory=pin)
        for layer, weights in enumerate(generators):
            views = layout.views(flat, layer)
            if weights is None:
                views.bias.fill_(1)
                continue
            for name, tensor in weights.named_tensors().items():
                views.named_tensors()[name].copy_(tensor)
        return cls(layout, flat)


def max_entries(num_layers: int, hidden_size: int, width: int, max_rank: int) -> int:
    """Entries of the largest adapter with an r of at most `max_rank`."""
    # The pooler is largest if num_capsules equals r.
    config = AdapterConfig(r=max_rank, num_capsules=max_rank)
    return num_layers * GeneratorLayout.of(config, hidden_size, width).size


def _aligned(entries: int) -> int:
    return math.ceil(entries / ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    part = flat[: math.prod(shape)]
    if name == "up.weight":
        # [d_out, r] is stored as [r, d_out], so that loads of neighbouring outputs are contiguous for every r.
        return part.view(shape[1], shape[0]).T
    if name == "pooler.weight":
        # [k, r, c] is stored as [r, k, c], so that all W_k lie side by side.
        return part.view(shape[1], shape[0], shape[2]).permute(1, 0, 2)
    return part.view(shape)
