# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch

from vllm_parade.adapter import (
    AdapterConfig,
    BaseModelShape,
    GeneratorWeights,
    generator_shapes,
    initial_generator,
    parameter_count,
)

LLAMA_7B = SimpleNamespace(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({}, 8_951_808),
        ({"pooler": "last_token"}, 32 * (4096 * 12 + 12 * 19200)),
        ({"sites": ("q", "k", "v", "gate", "up"), "r": 8}, 9_833_472),
        ({"sites": ("q", "v"), "r": 24}, 9_458_688),
    ],
)
def test_parameter_counts_of_the_paper(settings, counted):
    assert parameter_count(AdapterConfig(**settings), BaseModelShape.from_hf_config(LLAMA_7B), bias=False) == counted


def test_bias_adds_its_width():
    config, shape = AdapterConfig(), BaseModelShape.from_hf_config(LLAMA_7B)
    assert parameter_count(config, shape) - parameter_count(config, shape, bias=False) == 614_400


def test_grouped_query_attention_narrows_k_and_v():
    grouped = SimpleNamespace(**vars(LLAMA_7B), num_key_value_heads=8, head_dim=64)
    widths = BaseModelShape.from_hf_config(grouped).widths
    assert (widths["q"], widths["k"], widths["v"]) == (32 * 64, 8 * 64, 8 * 64)


def test_initial_generator_has_the_stated_distribution():
    config, shape = AdapterConfig(), BaseModelShape.from_hf_config(LLAMA_7B)
    weights = initial_generator(config, shape, torch.Generator().manual_seed(0))
    assert {name: tuple(t.shape) for name, t in weights.named_tensors().items()} == generator_shapes(config, shape)
    assert all(tensor.dtype == torch.float32 for tensor in weights.named_tensors().values())
    assert weights.down.mean().abs() < 0.001
    assert weights.down.std().item() == pytest.approx(0.02, rel=0.01)
    assert weights.down.abs().max() <= 0.02 * 3**0.5
    assert not weights.up.any()
    assert (weights.bias == 1).all()


def test_initial_generator_repeats_with_its_seed(config, shape):
    first, second = (initial_generator(config, shape, torch.Generator().manual_seed(3)) for _ in range(2))
    for name, tensor in first.named_tensors().items():
        assert torch.equal(tensor, second.named_tensors()[name])


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing", "last_token"])
def test_weights_move_and_keep_their_names(pooler, shape):
    config = AdapterConfig(pooler=pooler)
    moved = initial_generator(config, shape).to("cpu", torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in moved.named_tensors().values())
    assert set(moved.named_tensors()) == set(generator_shapes(config, shape))
    assert GeneratorWeights.from_named_tensors(moved.named_tensors()).query is moved.query
