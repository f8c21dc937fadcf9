# SPDX-License-Identifier: Apache-2.0
"""Standardized input of generators. Hidden states differ by far less than what they have in common."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Lower bound of a dimension's deviation, as a share of the mean deviation and of its own over all positions. Smaller
# differences carry hardly any information.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Standard:
    """Deviation and mean direction of hidden states. A down projection can remove both.

    With D the diagonal of `std` and u = `common`, a weight W on standardized hidden states (I - u u^T) D^-1 h equals
    the weight W (I - u u^T) D^-1 on hidden states h. So a standardized adapter has the usual format.
    """

    std: Tensor
    """[d], standard deviation of each hidden dimension."""
    common: Tensor
    """[d], direction of the mean after division by `std`, of length 1."""

    def fold(self, weight: Tensor) -> Tensor:
        """Convert a weight [..., r, d] on standardized hidden states to one on hidden states."""
        return (weight - (weight @ self.common)[..., None] * self.common) / self.std

    def unfold(self, weight: Tensor) -> Tensor:
        """The inverse of `fold`, for a weight that ignores the common direction."""
        return weight * self.std


class Moments:
    """First and second moments of hidden states, [positions, d], in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, hidden: Tensor) -> None:
        """Add hidden states, [positions, d]."""
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
    """Moments of a layer's hidden states before training: of those that the pooler reads, and of all."""

    def __init__(self, pooler: str) -> None:
        self.pooler = pooler
        self._read, self._all = Moments(), Moments()

    def add(self, hidden: Tensor, mask: Tensor) -> None:
        """Add instructions: hidden states [batch, tokens, d] and a mask [batch, tokens], bool."""
        self._all.add(hidden[mask])
        self._read.add(hidden[positions_read(mask, self.pooler)])

    def standard(self) -> Standard:
        """Deviation and mean direction of the hidden states that the pooler reads.

        With a template, every prompt ends with the same token, whose hidden states hardly differ in the first layers.
        Measured by that deviation, any other last token would be far away and get extreme vectors. So a deviation is
        at least a share of the one over all positions.

        Raises:
            ValueError: fewer than two positions.
        """
        if self._read.count < 2:
            count = self._read.count
            raise ValueError(f"{count} positions give no deviation; give the prompts of a few hundred examples")
        std = self._read.std
        least = LEAST_SHARE * torch.maximum(self._all.std, std.mean())
        std = torch.maximum(std, least).clamp_min(torch.finfo(torch.bfloat16).eps)
        return Standard(std.float(), F.normalize(self._read.mean / std, dim=0).float())


def positions_read(mask: Tensor, pooler: str) -> Tensor:
    """Mask [batch, tokens] of the positions that a pooler reads.

    Args:
        mask: [batch, tokens] bool, True at the instruction's tokens
    """
    if pooler != "last_token":
        return mask
    return mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)


class DownProjection(nn.Linear):
    """W_down [r, d].

    With a standard, the parameter is the weight on standardized hidden states. It is easier to optimize, because all
    its inputs have the same scale. State dicts hold W_down itself.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)
        self.register_buffer("std", None, persistent=False)
        self.register_buffer("common", None, persistent=False)

    @property
    def standard(self) -> Standard | None:
        """The `Standard` of the inputs, or None."""
        return None if self.std is None else Standard(self.std, self.common)

    @standard.setter
    def standard(self, standard: Standard) -> None:
        self.std, self.common = standard.std.to(self.weight.device), standard.common.to(self.weight.device)

    @property
    def plain(self) -> Tensor:
        """W_down itself. Gradients flow through."""
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
