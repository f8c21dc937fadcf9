# SPDX-License-Identifier: Apache-2.0
"""The instructions of a step, laid out as the kernels take them. Needs no Triton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_parade.ops.packed import GeneratorLayout

# Columns of `jobs`, one row an instruction: row, start, length, slot, r, capsules, pooler, activation, whether it reads
# the attention's input, entries of a layer, where query, weight, up and bias begin in it (ABSENT for none), padding.
NUM_JOB_FIELDS = 16
ABSENT = -1
# Columns of `tiles`, one row a piece of an instruction: the job and the first token within it.
NUM_TILE_FIELDS = 2
# Number of jobs, number of tiles, padding. Kernels are compiled for addresses that are multiples of 16 bytes.
NUM_COUNTS = 4
BLOCK_TOKENS = 32
POOLER_NUMBERS = {"attentional_capsule": 0, "dynamic_routing": 1, "last_token": 2}
ACTIVATION_NUMBERS = {"gelu": 0, "relu": 1, "silu": 2, "tanh": 3}


@dataclass(frozen=True)
class GeneratorJob:
    """Read tokens [start, start + length) of the batch with the generators in `slot`, write `row`."""

    row: int
    start: int
    length: int
    slot: int
    layout: GeneratorLayout
    """Of the adapter that holds the slot."""


@dataclass(frozen=True)
class GeneratorStep:
    """The instructions of a step on the device, at addresses that never change: CUDA graphs replay them."""

    counts: Tensor
    """[NUM_COUNTS] int32"""
    jobs: Tensor
    """[max jobs, NUM_JOB_FIELDS] int32; those past the count are left over from earlier steps"""
    tiles: Tensor
    """[max tiles, NUM_TILE_FIELDS] int32, likewise"""

    @classmethod
    def in_buffer(cls, buffer: Tensor, max_jobs: int) -> "GeneratorStep":
        """Views of an int32 buffer of `step_size` entries, on any device."""
        fields = max_jobs * NUM_JOB_FIELDS
        counts, jobs, tiles = buffer.split([NUM_COUNTS, fields, len(buffer) - NUM_COUNTS - fields])
        return cls(counts, jobs.view(-1, NUM_JOB_FIELDS), tiles.view(-1, NUM_TILE_FIELDS))

    def fill(self, jobs: Sequence[GeneratorJob]) -> None:
        """Write a step's jobs into a buffer in host memory."""
        fields: list[int] = []
        tiles: list[int] = []
        for number, job in enumerate(jobs):
            fields += [job.row, job.start, job.length, job.slot, *_kind(job.layout)]
            for first in range(0, job.length, BLOCK_TOKENS):
                tiles += [number, first]
        for tensor, numbers in ((self.jobs, fields), (self.tiles, tiles)):
            tensor.view(-1).numpy()[: len(numbers)] = numbers
        self.counts[0], self.counts[1] = len(jobs), len(tiles) // NUM_TILE_FIELDS


def step_size(max_num_tokens: int, max_jobs: int) -> int:
    """int32 numbers of a GeneratorStep for batches of at most so many tokens and instructions."""
    max_tiles = math.ceil(max_num_tokens / BLOCK_TOKENS) + max_jobs
    return NUM_COUNTS + max_jobs * NUM_JOB_FIELDS + max_tiles * NUM_TILE_FIELDS


def _kind(layout: GeneratorLayout) -> tuple[int, ...]:
    config, offsets = layout.config, layout.offsets
    return (
        config.r,
        config.num_capsules,
        POOLER_NUMBERS[config.pooler],
        ACTIVATION_NUMBERS[config.activation],
        int(config.generator_input == "attention_input"),
        layout.size,
        *(offsets.get(name, ABSENT) for name in ("pooler.query", "pooler.weight", "up.weight", "up.bias")),
        *(0, 0),
    )
