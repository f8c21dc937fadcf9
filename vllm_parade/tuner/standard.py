# SPDX-License-Identifier: Apache-2.0
"""Generators that begin by reading what tells hidden states apart, which is far less than what they have in common."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this share of the mean deviation, a hidden dimension counts as having that much: it hardly tells anything.
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
    """First and second moments of hidden states [..., d], in float64."""

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

    def standard(self) -> Standard:
        """How what was taken is spread.

        Raises:
            ValueError: less than two positions.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} positions tell no deviation; give the prompts of a few hundred examples")
        mean = torch.as_tensor(self.total) / self.count
        variance = (torch.as_tensor(self.squares) - self.count * mean.square()) / (self.count - 1)
        std = variance.clamp_min(0).sqrt()
        std = std.clamp_min(max(LEAST_SHARE * std.mean().item(), torch.finfo(torch.bfloat16).eps))
        return Standard(std.float(), F.normalize(mean / std, dim=0).float())


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
