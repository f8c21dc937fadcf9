# SPDX-License-Identifier: Apache-2.0
"""The kernels match the reference. Runs on a GPU, or on the CPU under Triton's interpreter."""

import pytest
import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, GeneratorWeights, initial_generator
from vllm_parade.ops import reference
from vllm_parade.ops.job import GeneratorJob, GeneratorStep, step_size
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if DEVICE == "cuda":
    # Triton's interpreter multiplies bfloat16 matrices as if their bits were integers.
    TOLERANCE[torch.bfloat16] = 2e-2
HIDDEN = 200
WIDTHS = {"q": 96, "k": 32, "v": 32, "gate": 130, "up": 141}
SHAPE = BaseModelShape(HIDDEN, 1, WIDTHS)
CONFIGS = [
    {},
    {"r": 8, "num_capsules": 2, "activation": "relu", "generator_input": "attention_input"},
    {"r": 7, "num_capsules": 1, "activation": "silu", "pooler": "dynamic_routing"},
    {"r": 5, "num_capsules": 3, "activation": "tanh", "pooler": "last_token"},
    {"r": 48, "num_capsules": 16},
    {"r": 64, "num_capsules": 4, "pooler": "dynamic_routing"},
]


def random_generator(config: AdapterConfig, seed: int, dtype: torch.dtype) -> GeneratorWeights:
    random = torch.Generator().manual_seed(seed)
    weights = initial_generator(config, SHAPE, random)
    weights.up.normal_(0, 0.25, generator=random)
    for tensor in (weights.down, weights.query, weights.weight):
        if tensor is not None:
            tensor.normal_(0, 0.2, generator=random)
    return weights.to(DEVICE, dtype)


def in_slots(weights, settings, dtype):
    """Slots of two layers, the second with these generators, and their layouts. Unused entries of a slot are NaN."""
    layouts = [GeneratorLayout.of(config, HIDDEN, sum(WIDTHS.values())) for config in settings]
    packed = [
        PackedGenerators.pack(layout, [None, generator], dtype, pin=False)
        for layout, generator in zip(layouts, weights, strict=True)
    ]
    flat = torch.full((len(packed), max(len(one.flat) for one in packed) + 16), float("nan"), dtype=dtype)
    for slot, one in zip(flat, packed, strict=True):
        slot[: len(one.flat)] = one.flat
    return flat.to(DEVICE), layouts


def on_device(jobs, num_tokens, max_jobs=12):
    """A step in a buffer that was filled with stale numbers."""
    step = GeneratorStep.in_buffer(torch.full((step_size(num_tokens, max_jobs),), 7, dtype=torch.int32), max_jobs)
    step.fill(jobs)
    return GeneratorStep(*(tensor.to(DEVICE) for tensor in vars(step).values()))


def run_both(lengths, configs, dtype, *, gap=3, num_rows=None, strided=False):
    """Tables of the kernels and of the reference, with `gap` other tokens between the instructions."""
    from vllm_parade.ops import generate

    random = torch.Generator().manual_seed(0)
    total = sum(lengths) + gap * (len(lengths) + 1)
    width = sum(WIDTHS.values())
    streams = [torch.randn(total, HIDDEN, generator=random).to(DEVICE, dtype) for _ in range(2)]
    if strided:
        streams = [torch.cat([stream, stream], dim=1)[:, :HIDDEN] for stream in streams]
    settings = [AdapterConfig(sites=tuple(WIDTHS), **config) for config in configs]
    weights = [random_generator(config, seed, dtype) for seed, config in enumerate(settings)]
    flat, layouts = in_slots(weights, settings, dtype)
    table = torch.full((num_rows or len(lengths) + 2, width), float("nan"), device=DEVICE, dtype=dtype)
    start, jobs, wanted = gap, [], table.clone()
    for number, length in enumerate(lengths):
        slot = number % len(configs)
        jobs.append(GeneratorJob(number + 1, start, length, slot, layouts[slot]))
        hidden = streams[settings[slot].generator_input == "attention_input"][start : start + length]
        mask = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
        choice = {"pooler": settings[slot].pooler, "activation": settings[slot].activation}
        wanted[number + 1] = reference.generate(hidden[None], mask, **vars(weights[slot]), **choice)[0]
        start += length + gap
    workspace = torch.full((generate.workspace_size(total, 64),), float("nan"), device=DEVICE)
    generate.generate_rows(*streams, table, flat, 1, on_device(jobs, total), workspace, 64)
    return table, wanted


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())) or "default")
def test_one_adapter(config, dtype):
    table, wanted = run_both([1, 2, 31, 32, 33, 70], [config], dtype)
    torch.testing.assert_close(table, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adapters_of_every_kind_in_one_launch(dtype):
    table, wanted = run_both([5, 17, 64, 1, 40, 33, 9, 100], CONFIGS, dtype)
    torch.testing.assert_close(table, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


def test_long_instruction():
    # Longer than one token block of the pooling kernel, for every capsule size.
    table, wanted = run_both([2200], [{"r": 4, "num_capsules": 4}], torch.float32)
    torch.testing.assert_close(table, wanted, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_strided_input():
    table, wanted = run_both([19, 50], CONFIGS[:2], torch.float32, strided=True)
    torch.testing.assert_close(table, wanted, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_more_instructions_than_programs():
    table, wanted = run_both([1, 3] * 6, CONFIGS[:3], torch.float32)
    torch.testing.assert_close(table, wanted, atol=2e-5, rtol=2e-5, equal_nan=True)


def generate_with(weights, jobs_of):
    """The table before and after a layer with these weights runs."""
    from vllm_parade.ops import generate

    flat, layouts = in_slots([weights], [AdapterConfig(sites=tuple(WIDTHS))], torch.float32)
    table = torch.arange(3.0 * sum(WIDTHS.values()), device=DEVICE).view(3, -1)
    before = table.clone()
    hidden = torch.randn(10, HIDDEN, device=DEVICE)
    workspace = torch.empty(generate.workspace_size(10, 64), device=DEVICE)
    generate.generate_rows(hidden, hidden, table, flat, 1, on_device(jobs_of(layouts[0]), 10), workspace, 64)
    return before, table


def test_layer_without_generator_writes_ones():
    before, table = generate_with(None, lambda layout: [GeneratorJob(2, 0, 10, 0, layout)])
    assert table[2].eq(1).all()
    assert torch.equal(table[:2], before[:2])


def test_a_step_without_instructions_writes_nothing():
    before, table = generate_with(None, lambda layout: [])
    assert torch.equal(table, before)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_one_graph_serves_every_step_of_its_size():
    """Captured without instructions; replayed with one, with several, and with none."""
    from vllm_parade.ops import generate

    settings = [AdapterConfig(sites=tuple(WIDTHS), **config) for config in CONFIGS]
    weights = [random_generator(config, seed, torch.float32) for seed, config in enumerate(settings)]
    flat, layouts = in_slots(weights, settings, torch.float32)
    hidden = torch.randn(100, HIDDEN, device=DEVICE)
    table = torch.zeros(20, sum(WIDTHS.values()), device=DEVICE)
    step = on_device([], 100)
    workspace = torch.empty(generate.workspace_size(100, 64), device=DEVICE)

    def run(table, step):
        generate.generate_rows(hidden, hidden, table, flat, 1, step, workspace, 64)

    run(table, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(table, step)
    for slots in ([2], [0, 1, 2, 3, 4, 5, 0, 3], []):
        jobs = [GeneratorJob(n + 1, 12 * n, 5 + n, slot, layouts[slot]) for n, slot in enumerate(slots)]
        filled, wanted = on_device(jobs, 100), table.clone()
        run(wanted, filled)
        for target, source in zip(vars(step).values(), vars(filled).values(), strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(table, wanted)
