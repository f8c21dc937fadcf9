"""Adapters made for tests."""

from pathlib import Path
from typing import Any

import torch

from vllm_parade import ParadeRequest
from vllm_parade.adapter import AdapterConfig, BaseModelShape, GeneratorWeights, initial_generator, save_adapter

# Strong enough that a wrong row, token or layer shows in every answer.
STRONG = 0.25

VARIANTS: dict[str, dict[str, Any]] = {
    "strong": {},
    "strong2": {},
    "rank8": {"r": 8, "num_capsules": 2, "generator_input": "attention_input"},
    "routing": {"pooler": "dynamic_routing", "r": 24, "num_capsules": 3, "activation": "silu"},
    # This pooler does not squash, so its vectors are five times as strong: at STRONG the float32 oracle itself is off
    # its float64 self by 2e-3 in log-probability, and equality with it would mean nothing.
    "last": {"pooler": "last_token", "activation": "tanh", "strength": STRONG / 5},
    "five": {"sites": ("q", "k", "v", "gate", "up"), "r": 6, "num_capsules": 3},
    "some_layers": {"layers_to_transform": (0, 3, 7), "sites": ("q", "v"), "activation": "relu"},
}


def make_adapter(
    folder: Path,
    shape: BaseModelShape,
    seed: int,
    strength: float = STRONG,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> ParadeRequest:
    """Save an adapter whose up projections are random with standard deviation `strength`."""
    settings = AdapterConfig(**config)
    random = torch.Generator().manual_seed(seed)
    layers = settings.layers_to_transform or range(shape.num_layers)
    generators: dict[int, GeneratorWeights] = {}
    for layer in layers:
        weights = initial_generator(settings, shape, random)
        weights.up.normal_(0, strength, generator=random)
        generators[layer] = weights.to("cpu", dtype)
    save_adapter(folder, settings, generators)
    return ParadeRequest(folder.name, str(folder))
