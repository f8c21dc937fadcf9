# SPDX-License-Identifier: Apache-2.0
"""Runs, and groups of runs that train side by side."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Hyperparameters:
    """One run of a group: all settings in which runs of a group may differ."""

    lr: float
    seed: int = 0
    bias_lr: float = 1.0
    """Learning rate of b_up, as a multiple of `lr`."""
    initial_std: float = 1.0
    """Initial standard deviation of down projection and pooler, as a multiple of the default."""


@dataclass(frozen=True)
class Group:
    """Runs that train side by side: one method with one shape, on one task or on a mixture of tasks."""

    name: str
    method: str
    tasks: tuple[str, ...]
    runs: tuple[Hyperparameters, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 400
    rows: int = 16
    """Pairs per run and step."""
    own_words: bool = False
    """Whether generators read only the user's words, without the template around them."""
    standardized: bool = False
    """Whether generators are standardized before training (`ParadeModel.standardize`)."""
