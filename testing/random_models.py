# SPDX-License-Identifier: Apache-2.0
"""Small random models, and random adapters whose effect shows in every answer."""

from pathlib import Path
from typing import Any

import torch

from vllm_parade import ParadeRequest
from vllm_parade.adapter import AdapterConfig, BaseModelShape, adapted_layers, initial_generator, save_adapter

# Large enough that a wrong row, token or layer shows in every answer. `Oracle.check` asserts the effect.
STRONG = 0.25
# Squashing squares small values. Hidden states of a small random model, and hidden states after a norm, are small. For
# these, down projection and pooler need ten times their initial standard deviation to have an effect.
INNER = 0.2


def make_tiny_model(
    folder: Path, architecture: str = "LlamaForCausalLM", kv_heads: int = 2, one_dimensional: float = 0.0
) -> BaseModelShape:
    """Save a random float32 model of three layers and four heads, without a tokenizer.

    Args:
        one_dimensional: standard deviation of noise added to biases and norms, which start as zeros and ones
    """
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        # Random weights of the usual size give almost equal log-probabilities, which are hard to compare.
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = model_class(config)
    for parameter in model.parameters() if one_dimensional else ():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * one_dimensional
    model.save_pretrained(folder)
    return BaseModelShape.from_hf_config(config)


def make_adapter(
    folder: Path,
    shape: BaseModelShape,
    seed: int,
    strength: float = STRONG,
    inner: float | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> ParadeRequest:
    """Save an adapter with random up projections, named like its folder.

    Args:
        strength: standard deviation of the up projections
        inner: standard deviation of down projections and poolers; by default they have their initial values
        config: fields of `AdapterConfig`
    """
    adapter_config, random = AdapterConfig(**config), torch.Generator().manual_seed(seed)
    generators = {}
    for layer in adapted_layers(adapter_config, shape):
        weights = initial_generator(adapter_config, shape, random)
        weights.up.normal_(0, strength, generator=random)
        for tensor in (weights.down, weights.query, weights.weight):
            if inner is not None and tensor is not None:
                tensor.normal_(0, inner, generator=random)
        generators[layer] = weights.to("cpu", dtype)
    save_adapter(folder, adapter_config, generators)
    return ParadeRequest(folder.name, str(folder))
