# SPDX-License-Identifier: Apache-2.0
"""An adapter's generators in one flat tensor, so that one copy brings them to the device. Needs no Triton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vllm_parade.adapter import GeneratorWeights

# What stands for one generator, in this order: down [r, hidden], query [k, r], weight [r, r] (all W_k side by side:
# column i * r / k + c belongs to capsule i), up [width, r], bias [width].
_FIELDS = [field.name for field in fields(GeneratorWeights)]
NUM_TENSORS = len(_FIELDS)
# Where a tensor would be that the generator does not have.
ABSENT = -1
# Every tensor begins at a multiple of this many entries: 32 bytes or more, so kernels may load it in wide pieces.
ALIGNMENT = 16


@dataclass(frozen=True)
class PackedGenerators:
    """The generators of one adapter, layer by layer."""

    flat: Tensor
    """[entries]"""
    offsets: Tensor
    """[layers, NUM_TENSORS] int64: entry of `flat` at which each tensor begins, ABSENT where there is none."""
    shapes: tuple[tuple[torch.Size | None, ...], ...]
    """Shape of each tensor of each layer, as GeneratorWeights has it."""

    @classmethod
    def pack(
        cls, generators: Sequence[GeneratorWeights | None], dtype: torch.dtype, *, pin: bool
    ) -> "PackedGenerators":
        """Join the generators of all layers; page-locked with `pin`, so that the device copies without the host."""
        layers = [[None] * NUM_TENSORS if weights is None else list(vars(weights).values()) for weights in generators]
        offsets, end = [], 0
        for tensor in (tensor for layer in layers for tensor in layer):
            offsets.append(ABSENT if tensor is None else end)
            end += 0 if tensor is None else _aligned(tensor.numel())
        flat = torch.empty(end, dtype=dtype, pin_memory=pin)
        table = torch.tensor(offsets, dtype=torch.int64, pin_memory=pin).view(-1, NUM_TENSORS)
        shapes = tuple(tuple(None if tensor is None else tensor.shape for tensor in layer) for layer in layers)
        packed = cls(flat, table, shapes)
        for layer, weights in enumerate(generators):
            views = packed.generator(layer, flat)
            if weights is not None and views is not None:
                for name, view in views.named_tensors().items():
                    view.copy_(weights.named_tensors()[name])
        return packed

    def generator(self, layer: int, flat: Tensor) -> GeneratorWeights | None:
        """A layer's generator as views of `flat`, this one's or a copy of it; None if the layer has none."""
        if self.shapes[layer][0] is None:
            return None
        places = zip(_FIELDS, self.offsets[layer].tolist(), self.shapes[layer], strict=True)
        views: dict[str, Any] = {
            name: None if shape is None else _view(flat, offset, shape) for name, offset, shape in places
        }
        return GeneratorWeights(**views)


def max_entries(num_layers: int, hidden_size: int, width: int, max_rank: int) -> int:
    """Entries that the largest adapter needs whose r is at most `max_rank`.

    Args:
        width: entries of a vector of all sites
    """
    sizes = (max_rank * hidden_size, max_rank**2, max_rank**2, width * max_rank, width)
    return num_layers * sum(map(_aligned, sizes))


def _aligned(entries: int) -> int:
    return math.ceil(entries / ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, offset: int, shape: torch.Size) -> Tensor:
    part = flat[offset : offset + math.prod(shape)]
    if len(shape) < 3:
        return part.view(shape)
    # W_k lie side by side: [k, r, c] is stored as [r, k, c].
    return part.view(shape[1], shape[0], shape[2]).permute(1, 0, 2)
