# SPDX-License-Identifier: Apache-2.0
"""Generators are unchanged after a round trip through one flat tensor."""

import pytest
import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, initial_generator
from vllm_parade.ops import reference
from vllm_parade.ops.packed import ALIGNMENT, GeneratorLayout, PackedGenerators, max_entries

SITES = ("q", "k", "v", "gate", "up")
SHAPE = BaseModelShape(40, 2, {"q": 24, "k": 8, "v": 8, "gate": 50, "up": 50})
WIDTH = SHAPE.output_width(SITES)


def pack(seeds, dtype=torch.float32, **options):
    """Layers with random weights (None where the seed is None), and the same layers packed."""
    config = AdapterConfig(sites=SITES, **options)
    layers = []
    for seed in seeds:
        weights = None if seed is None else initial_generator(config, SHAPE)
        for tensor in weights.named_tensors().values() if weights else ():
            tensor.normal_(generator=torch.Generator().manual_seed(seed))
        layers.append(weights)
    return layers, PackedGenerators.pack(GeneratorLayout.of(config, 40, WIDTH), layers, dtype, pin=False)


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing", "last_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(pooler, dtype):
    layers, packed = pack([0, 1], dtype, pooler=pooler)
    elsewhere = torch.cat([packed.flat, torch.full((9,), torch.nan, dtype=dtype)])
    for number, weights in enumerate(layers):
        got = packed.layout.views(elsewhere, number).named_tensors()
        wanted = weights.to("cpu", dtype).named_tensors()
        assert list(got) == list(wanted)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing", "last_token"])
def test_a_layer_without_generator_writes_ones(pooler):
    _, packed = pack([0, None], pooler=pooler)
    weights = vars(packed.layout.views(packed.flat, 1))
    hidden, mask = torch.randn(1, 6, 40), torch.ones(1, 6, dtype=torch.bool)
    vectors = reference.generate(hidden, mask, **weights, pooler=pooler, activation="gelu")
    assert torch.equal(vectors, torch.ones(1, WIDTH))


def test_every_tensor_is_aligned():
    _, packed = pack([0])
    assert all(offset % ALIGNMENT == 0 for offset in packed.layout.offsets.values())
    assert packed.layout.size % ALIGNMENT == 0


def test_capsules_lie_side_by_side():
    """Column k * (r / K) + c of the packed [r, r] is column c of W_k."""
    layers, packed = pack([0], r=12, num_capsules=4)
    start = packed.layout.offsets["pooler.weight"]
    square = packed.flat[start : start + 144].view(12, 12)
    assert torch.equal(square[:, 3:6], layers[0].weight[1])


@pytest.mark.parametrize("options", [{"r": 16, "num_capsules": 16}, {"r": 12}, {"r": 16, "pooler": "last_token"}])
def test_the_largest_adapter_fits(options):
    _, packed = pack([0, 1], **options)
    assert len(packed.flat) <= max_entries(2, 40, WIDTH, 16)
