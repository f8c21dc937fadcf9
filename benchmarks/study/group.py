# SPDX-License-Identifier: Apache-2.0
"""What is trained side by side: runs, and groups of them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Hyperparameters:
    """One run of a group: everything in which runs of a group may differ."""

    lr: float
    seed: int = 0
    bias_lr: float = 1.0
    """Learning rate of b_up, as a multiple of the others'."""
    initial_std: float = 1.0
    """Initial standard deviation of down projection and pooler, as a multiple of the usual."""


@dataclass(frozen=True)
class Group:
    """Runs that train side by side: one method with one shape, on one task or on several as a mixture."""

    name: str
    method: str
    tasks: tuple[str, ...]
    runs: tuple[Hyperparameters, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 400
    rows: int = 16
    """Pairs of each run in a step."""
    own_words: bool = False
    """Whether generators read only the user's words, not the template around them."""
    standardized: bool = False
    """Whether generators are standardized before training (`ParadeModel.standardize`)."""
