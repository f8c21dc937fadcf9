# SPDX-License-Identifier: Apache-2.0
"""Generators in one flat tensor come back as they were."""

import pytest
import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, initial_generator
from vllm_parade.ops.packed import ABSENT, ALIGNMENT, NUM_TENSORS, PackedGenerators, max_entries

SHAPE = BaseModelShape(40, 2, {"q": 24, "k": 8, "v": 8, "gate": 50, "up": 50})


def generator(seed=0, **options):
    random = torch.Generator().manual_seed(seed)
    weights = initial_generator(AdapterConfig(**options), SHAPE, random)
    for tensor in weights.named_tensors().values():
        tensor.normal_(generator=random)
    return weights


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing", "last_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(pooler, dtype):
    layers = [generator(0, pooler=pooler), None, generator(1, pooler=pooler)]
    packed = PackedGenerators.pack(layers, dtype, pin=False)
    elsewhere = torch.cat([packed.flat, torch.full((9,), torch.nan, dtype=dtype)])
    for number, weights in enumerate(layers):
        got = packed.generator(number, elsewhere)
        if weights is None:
            assert got is None
            continue
        wanted = weights.to("cpu", dtype).named_tensors()
        assert list(got.named_tensors()) == list(wanted)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.named_tensors().items())


def test_offsets():
    packed = PackedGenerators.pack([generator(pooler="dynamic_routing"), None], torch.float32, pin=False)
    assert packed.offsets.shape == (2, NUM_TENSORS)
    assert packed.offsets[0, 1] == ABSENT
    assert (packed.offsets[1] == ABSENT).all()
    present = packed.offsets[packed.offsets != ABSENT]
    assert (present % ALIGNMENT == 0).all()


def test_capsules_lie_side_by_side():
    """Column k * (r / K) + c of the packed [r, r] is column c of W_k."""
    weights = generator(r=12, num_capsules=4)
    packed = PackedGenerators.pack([weights], torch.float32, pin=False)
    start = packed.offsets[0, 2]
    square = packed.flat[start : start + 144].view(12, 12)
    assert torch.equal(square[:, 3:6], weights.weight[1])


@pytest.mark.parametrize("options", [{"r": 16, "num_capsules": 16}, {"r": 12}, {"r": 16, "pooler": "last_token"}])
def test_the_largest_adapter_fits(options):
    layers = [generator(sites=tuple(SHAPE.widths), **options)] * 2
    packed = PackedGenerators.pack(layers, torch.float32, pin=False)
    assert len(packed.flat) <= max_entries(2, 40, SHAPE.output_width(tuple(SHAPE.widths)), 16)
