# SPDX-License-Identifier: Apache-2.0
"""Measures the generator's kernels without an engine: all layers of a model, one after the other, as in an engine.

First the rows of all layers are compared with `vllm_parade.ops.reference`. Then each step is timed twice: as a CUDA
graph replay (device time), and with individual launches (host time, on an otherwise idle host).
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engine import MAX_NUM_SEQS
from benchmarks.models import SIZES
from benchmarks.samples import spread
from vllm_parade.adapter import AdapterConfig, BaseModelShape, GeneratorWeights, initial_generator
from vllm_parade.config import ServingConfig
from vllm_parade.layers import BatchMetadata, ParadeLayer
from vllm_parade.layers.sites import SiteShard
from vllm_parade.ops import reference
from vllm_parade.ops.job import GeneratorJob
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators, max_entries

# Prompts x length. A length of 0 is a step without instructions, whose kernels are launched but have no work.
STEPS = ((1, 274), (1, 600), (1, 8192), (8, 274), (32, 274), (59, 274), (1, 0), (256, 0))
MAX_TOKENS = 16384
DTYPE = torch.bfloat16
TOLERANCE = 4e-2
NUM_SLOTS = 64
DEVICE = torch.device("cuda")


class Kernels:
    """PARADE's state in an engine's worker, without the model."""

    def __init__(self, size: str) -> None:
        from transformers import LlamaConfig

        self.shape = BaseModelShape.from_hf_config(LlamaConfig(**SIZES[size]))
        self.config = AdapterConfig()
        numbers, hidden = range(self.shape.num_layers), self.shape.hidden_size
        max_rank = ServingConfig().max_parade_rank
        self.batch = BatchMetadata.make(MAX_TOKENS, MAX_NUM_SEQS, max_rank, DEVICE, kernels=True)
        shards = [SiteShard(site, self.shape.widths[site], 0) for site in self.config.sites]
        self.layers = [ParadeLayer(n, shards, MAX_NUM_SEQS + 1, self.batch, DEVICE, DTYPE) for n in numbers]
        width = self.shape.output_width(self.config.sites)
        entries = max_entries(len(numbers), hidden, width, max_rank)
        flat = torch.empty(NUM_SLOTS, entries, device=DEVICE, dtype=DTYPE)
        self.layout = GeneratorLayout.of(self.config, hidden, width)
        random = torch.Generator().manual_seed(0)
        self.packed = PackedGenerators.pack(self.layout, [self._generator(random) for _ in numbers], DTYPE, pin=False)
        flat[:, : len(self.packed.flat)] = self.packed.flat.to(DEVICE)
        for local_idx, layer in enumerate(self.layers):
            layer.bind(flat, local_idx)
        # Blocks of 128 tokens share a component. Otherwise pooling would average every instruction to nearly zero.
        common = torch.randn(MAX_TOKENS // 128, hidden, device=DEVICE, dtype=DTYPE).repeat_interleave(128, 0)
        self.hidden = common + torch.randn(MAX_TOKENS, hidden, device=DEVICE, dtype=DTYPE)

    def _generator(self, random: torch.Generator) -> GeneratorWeights:
        weights = initial_generator(self.config, self.shape, random)
        assert weights.query is not None
        assert weights.weight is not None
        for tensor in (weights.query, weights.weight, weights.up):
            tensor.normal_(0, 0.3, generator=random)
        return weights

    def step(self, prompts: int, length: int) -> Callable[[], None]:
        """A function that launches a step's kernels in all layers; the prompts use the slots in turn."""
        jobs = [
            GeneratorJob(row=n + 1, start=n * length, length=length, slot=n % NUM_SLOTS, layout=self.layout)
            for n in range(prompts if length else 0)
        ]
        tokens = max(length, 1)
        self.batch.prepare(list(range(1, prompts + 1)), [tokens] * prompts, jobs)
        hidden = self.hidden[: prompts * tokens]

        def launch() -> None:
            for layer in self.layers:
                layer.generate(hidden, hidden)

        return launch

    def check(self, prompts: int, length: int) -> None:
        """Compare a step's rows with the reference in all layers.

        Raises:
            SystemExit: they differ.
        """
        self.step(prompts, length)()
        hidden = self.hidden[: prompts * length].view(prompts, length, -1)
        mask = torch.ones(prompts, length, dtype=torch.bool, device=DEVICE)
        choice: dict[str, Any] = {"pooler": self.config.pooler, "activation": self.config.activation}
        for number, layer in enumerate(self.layers):
            weights = self.layout.views(self.packed.flat.to(DEVICE), number)
            wanted = reference.generate(hidden, mask, **vars(weights), **choice).float()
            difference = (layer.table[1 : prompts + 1].float() - wanted).abs().max().item()
            if not difference <= TOLERANCE:
                raise SystemExit(f"benchmarks: {prompts} x {length}: kernels off by {difference} (bound {TOLERANCE})")


def measure_kernels(size: str, repeats: int) -> list[dict[str, Any]]:
    """Measure all steps; returns their records."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: no GPU found; run `kernels` on a machine with a GPU")
    kernels = Kernels(size)
    for prompts, length in ((1, 274), (32, 274)):
        kernels.check(prompts, length)
    records = []
    for prompts, length in STEPS:
        launch = kernels.step(prompts, length)
        graph = _captured(launch)
        replayed = _seconds(graph.replay, repeats)
        launched = _seconds(launch, repeats)
        record = {
            "workload": "kernels",
            "variant": "parade",
            "step": "prefill" if length else "decode",
            "adapters": prompts if length else 0,
            "tokens": prompts * max(length, 1),
            **spread(replayed, "model"),
            "launched_ms": spread(launched, "model")["model_ms"],
        }
        record["layer_us"] = 1e3 * record["model_ms"] / len(kernels.layers)
        records.append(record)
    return records


def _captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def _seconds(function: Callable[[], None], repeats: int) -> list[float]:
    """Wall time of each call in seconds, including its work on the device."""
    samples = []
    for number in range(3 + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if number >= 3:
            samples.append(time.perf_counter() - started)
    return samples
