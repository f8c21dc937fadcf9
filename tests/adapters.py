"""Adapters made for tests."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.models import make_random_parade
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape

# Strong enough that a wrong row, token or layer shows in every answer: `Oracle.check` sees to it.
STRONG = 0.25
# Squashing squares what is small. Hidden states of a small random model, and those that a norm has passed, are small:
# there the projection down and the pooler need ten times their initial standard deviation to write anything.
INNER = 0.2

VARIANTS: dict[str, dict[str, Any]] = {
    "strong": {},
    "strong2": {},
    "rank8": {"r": 8, "num_capsules": 2, "generator_input": "attention_input", "inner": INNER},
    "routing": {"pooler": "dynamic_routing", "r": 24, "num_capsules": 3, "activation": "silu"},
    # This pooler does not squash, so its vectors are five times as strong: at STRONG the float32 oracle itself is off
    # its float64 self by 2e-3 in log-probability, and equality with it would mean nothing.
    "last": {"pooler": "last_token", "activation": "tanh", "strength": STRONG / 5},
    "five": {"sites": ("q", "k", "v", "gate", "up"), "r": 6, "num_capsules": 3},
    # Three layers of thirty must do what all do elsewhere.
    "some_layers": {
        "layers_to_transform": (0, 3, 7),
        "sites": ("q", "v"),
        "activation": "relu",
        "strength": 4 * STRONG,
    },
}


def make_adapter(
    folder: Path,
    shape: BaseModelShape,
    seed: int,
    strength: float = STRONG,
    inner: float | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> ParadeRequest:
    """Save an adapter whose up projections are random with standard deviation `strength`, what comes before them with
    `inner`, or as training begins."""
    make_random_parade(folder, shape, seed, dtype, strength, inner, **config)
    return ParadeRequest(folder.name, str(folder))
