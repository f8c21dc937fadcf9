"""Configs of all kinds of adapters, for tests that serve them together."""

from typing import Any

from testing.random_models import INNER, STRONG

VARIANTS: dict[str, dict[str, Any]] = {
    "strong": {},
    "strong2": {},
    "rank8": {"r": 8, "num_capsules": 2, "generator_input": "attention_input", "inner": INNER},
    "routing": {"pooler": "dynamic_routing", "r": 24, "num_capsules": 3, "activation": "silu"},
    # This pooler does not squash, so its vectors are five times as strong. At STRONG, the oracle's log-probabilities
    # differ by 2e-3 between float32 and float64, so a comparison with it would be meaningless.
    "last": {"pooler": "last_token", "activation": "tanh", "strength": STRONG / 5},
    "five": {"sites": ("q", "k", "v", "gate", "up"), "r": 6, "num_capsules": 3},
    # Only three of SmolLM2's thirty layers have vectors, so these are four times as strong.
    "some_layers": {
        "layers_to_transform": (0, 3, 7),
        "sites": ("q", "v"),
        "activation": "relu",
        "strength": 4 * STRONG,
    },
}
