# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: config, weights and validation. Does not import vLLM."""

from vllm_parade.adapter.checkpoint import Adapter, load_adapter, load_config, save_adapter
from vllm_parade.adapter.config import DEFAULT_SITES, SITES, AdapterConfig, AdapterError
from vllm_parade.adapter.weights import (
    BaseModelShape,
    GeneratorWeights,
    adapted_layers,
    generator_shapes,
    initial_generator,
    parameter_count,
)

__all__ = [
    "DEFAULT_SITES",
    "SITES",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "BaseModelShape",
    "GeneratorWeights",
    "adapted_layers",
    "generator_shapes",
    "initial_generator",
    "load_adapter",
    "load_config",
    "parameter_count",
    "save_adapter",
]
