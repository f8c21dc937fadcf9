# SPDX-License-Identifier: Apache-2.0
"""What a pass through the model carries along: which tokens are instruction, and the vectors read off them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Instruction:
    """A batch's instructions under an adapter. Travels as a keyword argument to every decoder layer, so that a layer
    that is computed again, as with gradient checkpointing, finds what it found before; later on the KV cache."""

    adapter: str
    mask: Tensor | None
    """[batch, tokens] bool, True at the instruction's tokens, where this pass reads it; None in later passes."""
    vectors: dict[int, Tensor] = field(default_factory=dict)
    """By layer, [batch, d_out]."""

    def read(self) -> "Instruction":
        """The same for passes that come after the one that read the instruction."""
        return replace(self, mask=None)


def before_labels(labels: Tensor) -> Tensor:
    """The positions before the first one that has a label, which is the response's first token.

    Args:
        labels: [batch, tokens], -100 where a token is not learnt

    Returns:
        [batch, tokens] bool
    """
    return ((labels != -100).cumsum(dim=1) == 0).to(torch.bool)


def combined(shape: torch.Size, device: torch.device, *masks: Tensor | None) -> Tensor:
    """Positions [batch, tokens] that all given masks show. A mask of fewer rows, as before a beam search repeats its
    prompts, is repeated row by row.

    Raises:
        ValueError: a mask of another shape, or a row without any position.
    """
    instruction = torch.ones(shape, dtype=torch.bool, device=device)
    for mask in masks:
        if mask is None:
            continue
        if mask.ndim != 2 or mask.shape[1] != shape[1] or not len(mask) or shape[0] % len(mask):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [batch, tokens], {tuple(shape)}")
        instruction &= mask.to(device).bool().repeat_interleave(shape[0] // len(mask), dim=0)
    if not instruction.any(dim=1).all():
        raise ValueError(
            "a row has no instruction token; every row needs at least one: a prompt before the first label, or a mask"
        )
    return instruction
