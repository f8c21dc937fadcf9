# SPDX-License-Identifier: Apache-2.0
"""State of a forward pass: which tokens are the instruction, and the vectors generated from them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_parade.tuner.attention import sequence_lengths


@dataclass(frozen=True)
class BatchInstructions:
    """A batch's instructions under an adapter.

    Every decoder layer gets them as a keyword argument, so gradient checkpointing recomputes a layer with the same
    instructions. Later forward passes get them from the KV cache.
    """

    adapter: str
    mask: Tensor | None
    """[batch, tokens] bool, True at the instruction's tokens. None in passes after the one that reads them."""
    vectors: dict[int, Tensor] = field(default_factory=dict)
    """[sequences, d_out] by layer number."""
    lengths: tuple[int, ...] | None = None
    """Lengths of the sequences in a packed batch, which is one row. None if every row is a sequence."""

    def sequences(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [sequences, tokens, hidden] and mask [sequences, tokens], with one sequence per row."""
        assert self.mask is not None
        mask = self.mask.to(hidden.device)
        if self.lengths is None:
            return hidden, mask
        parts = (pad_sequence(part[0].split(self.lengths), batch_first=True) for part in (hidden, mask))
        return next(parts), next(parts)

    def of_tokens(self, vectors: Tensor) -> Tensor:
        """Expand vectors [sequences, width] to a batch's tokens: [batch, 1, width], or [1, tokens, width] if packed."""
        if self.lengths is None:
            return vectors[:, None]
        return vectors.repeat_interleave(torch.tensor(self.lengths, device=vectors.device), dim=0)[None]

    def read(self) -> "BatchInstructions":
        """A copy for later passes, which do not read the instruction again."""
        return replace(self, mask=None)


def packed_lengths(position_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[int, ...] | None:
    """Lengths of the sequences in a packed batch: one row without a mask, in which position ids restart. Else None."""
    if position_ids is None or attention_mask is not None or len(position_ids) != 1:
        return None
    lengths = sequence_lengths(position_ids)
    return tuple(lengths) if len(lengths) > 1 else None


def before_labels(labels: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
    """Mask of the positions before each sequence's first label, which belongs to the response's first token.

    Args:
        labels: [batch, tokens], -100 at tokens without a label
        lengths: lengths of the sequences in a packed batch

    Returns:
        [batch, tokens] bool
    """
    if lengths is not None:
        return torch.cat([before_labels(part) for part in labels.split(lengths, dim=1)], dim=1)
    return (labels != -100).cumsum(dim=1) == 0


def combined(
    shape: torch.Size, device: torch.device, *masks: Tensor | None, lengths: tuple[int, ...] | None = None
) -> Tensor:
    """Mask of the positions [batch, tokens] that are in all given masks.

    The rows of a mask with fewer rows are repeated, as beam search repeats its prompts.

    Raises:
        ValueError: a mask has another shape, or a sequence has no position left.
    """
    instruction = torch.ones(shape, dtype=torch.bool, device=device)
    for mask in masks:
        if mask is None:
            continue
        if mask.ndim != 2 or mask.shape[1] != shape[1] or not len(mask) or shape[0] % len(mask):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [batch, tokens], {tuple(shape)}")
        instruction &= mask.to(device).bool().repeat_interleave(shape[0] // len(mask), dim=0)
    sequences = instruction if lengths is None else pad_sequence(instruction[0].split(lengths), batch_first=True)
    if not sequences.any(dim=1).all():
        raise ValueError(
            "a row has no instruction token; every row needs at least one: a prompt before the first label, or a mask"
        )
    return instruction
