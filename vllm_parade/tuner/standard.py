# SPDX-License-Identifier: Apache-2.0
"""Generators that begin by reading what tells hidden states apart, which is far less than what they have in common."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A hidden dimension has at least this share of the mean deviation, and of its own over all positions: what differs less
# hardly tells anything.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Standard:
    """How hidden states are spread: deviation and direction of the mean, by which a down projection can undo both.

    With D the diagonal of `std` and u = `common`, a weight W on standardized hidden states (I - u u^T) D^-1 h is the
    weight W (I - u u^T) D^-1 on hidden states h themselves. So an adapter trained like this is one like any other.
    """

    std: Tensor
    """[d], standard deviation of each hidden dimension."""
    common: Tensor
    """[d], direction of length 1 of the mean, where deviations are 1."""

    def fold(self, weight: Tensor) -> Tensor:
        """A weight [..., r, d] on standardized hidden states as one on hidden states."""
        return (weight - (weight @ self.common)[..., None] * self.common) / self.std

    def unfold(self, weight: Tensor) -> Tensor:
        """A weight that folds to the given one, if that one is blind to the common direction."""
        return weight * self.std


class Moments:
    """First and second moments of hidden states, [positions, d], in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, hidden: Tensor) -> None:
        """Take hidden states, [positions, d]."""
        hidden = hidden.double()
        self.count += len(hidden)
        self.total = self.total + hidden.sum(dim=0)
        self.squares = self.squares + hidden.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """[d]"""
        return torch.as_tensor(self.total) / self.count

    @property
    def std(self) -> Tensor:
        """[d]"""
        variance = (torch.as_tensor(self.squares) - self.count * self.mean.square()) / (self.count - 1)
        return variance.clamp_min(0).sqrt()


class Observed:
    """What a layer's generator was shown before training: the hidden states that its pooler reads, and all of them."""

    def __init__(self, pooler: str) -> None:
        self.pooler = pooler
        self._read, self._all = Moments(), Moments()

    def add(self, hidden: Tensor, mask: Tensor) -> None:
        """Take instructions, hidden states [batch, tokens, d] with a mask [batch, tokens], bool."""
        self._all.add(hidden[mask])
        self._read.add(hidden[positions_read(mask, self.pooler)])

    def standard(self) -> Standard:
        """How what the pooler reads is spread.

        A template ends every prompt with the same token, whose hidden states hardly differ in the first layers. By
        their own deviation any other last token would be far away, and its vectors out of bounds: so a deviation is at
        least a share of that over all positions.

        Raises:
            ValueError: less than two positions.
        """
        if self._read.count < 2:
            count = self._read.count
            raise ValueError(f"{count} positions tell no deviation; give the prompts of a few hundred examples")
        std = self._read.std
        least = LEAST_SHARE * torch.maximum(self._all.std, std.mean())
        std = torch.maximum(std, least).clamp_min(torch.finfo(torch.bfloat16).eps)
        return Standard(std.float(), F.normalize(self._read.mean / std, dim=0).float())


def positions_read(mask: Tensor, pooler: str) -> Tensor:
    """The positions of instructions that a pooler reads.

    Args:
        mask: [batch, tokens] bool, True at the instruction's tokens
    """
    if pooler != "last_token":
        return mask
    return mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)


class DownProjection(nn.Linear):
    """W_down [r, d]. Given a standard, its parameter is the weight on standardized hidden states, which an optimizer
    finds its way in, as all inputs are of one size there; who saves and loads it sees W_down itself."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)
        self.register_buffer("std", None, persistent=False)
        self.register_buffer("common", None, persistent=False)

    @property
    def standard(self) -> Standard | None:
        """Of what it reads, if it was given one."""
        return None if self.std is None else Standard(self.std, self.common)

    @standard.setter
    def standard(self, standard: Standard) -> None:
        self.std, self.common = standard.std.to(self.weight.device), standard.common.to(self.weight.device)

    @property
    def plain(self) -> Tensor:
        """W_down; gradients flow through."""
        return self.weight if self.standard is None else self.standard.fold(self.weight)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.standard is not None:
            destination[f"{prefix}weight"] = self.plain if keep_vars else self.plain.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        name = f"{prefix}weight"
        if self.standard is not None and name in state_dict:
            weight = state_dict[name].to(self.weight.device, self.weight.dtype)
            state_dict = {**state_dict, name: self.standard.unfold(weight)}
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
