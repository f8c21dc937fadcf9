# SPDX-License-Identifier: Apache-2.0
"""The instructions of a step, in the layout that the kernels read. Needs no Triton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from vllm_parade.ops.packed import GeneratorLayout


class JobField(IntEnum):
    """Columns of `jobs`, which has one row per instruction."""

    ROW = 0
    START = 1
    LENGTH = 2
    SLOT = 3
    RANK = 4
    CAPSULES = 5
    POOLER = 6
    """See Pooler."""
    ACTIVATION = 7
    """See Activation."""
    READS_ATTENTION_INPUT = 8
    """1 for the attention's input, 0 for the layer's."""
    LAYER_SIZE = 9
    """Entries per layer in the slot."""
    QUERY = 10
    """Offset of the tensor in its layer, as for the three fields below; ABSENT if there is none."""
    WEIGHT = 11
    UP = 12
    BIAS = 13


class Pooler(IntEnum):
    """Names as in the adapter's config."""

    ATTENTIONAL_CAPSULE = 0
    DYNAMIC_ROUTING = 1
    LAST_TOKEN = 2


class Activation(IntEnum):
    """Names as in the adapter's config."""

    GELU = 0
    RELU = 1
    SILU = 2
    TANH = 3


# Columns of `jobs`, padded because kernels are compiled for addresses that are multiples of 16 bytes.
NUM_JOB_FIELDS = 16
ABSENT = -1
# Columns of `tiles`, which has one row per tile of an instruction: the job, and the tile's first token in it.
NUM_TILE_FIELDS = 2
# Entries of `counts`: number of jobs, number of tiles, padding.
NUM_COUNTS = 4
BLOCK_TOKENS = 32


@dataclass(frozen=True)
class GeneratorJob:
    """Read tokens [start, start + length) of the batch with the generators in `slot`, write `row`."""

    row: int
    start: int
    length: int
    slot: int
    layout: GeneratorLayout
    """Layout of the adapter in the slot."""


@dataclass(frozen=True)
class GeneratorStep:
    """The instructions of a step. On the device, the addresses never change, as CUDA graphs require."""

    counts: Tensor
    """[NUM_COUNTS] int32"""
    jobs: Tensor
    """[max jobs, NUM_JOB_FIELDS] int32; rows beyond the count are not read"""
    tiles: Tensor
    """[max tiles, NUM_TILE_FIELDS] int32; rows beyond the count are not read"""

    @classmethod
    def in_buffer(cls, buffer: Tensor, max_jobs: int) -> "GeneratorStep":
        """Views of an int32 buffer of `step_size` entries, on any device."""
        fields = max_jobs * NUM_JOB_FIELDS
        counts, jobs, tiles = buffer.split([NUM_COUNTS, fields, len(buffer) - NUM_COUNTS - fields])
        return cls(counts, jobs.view(-1, NUM_JOB_FIELDS), tiles.view(-1, NUM_TILE_FIELDS))

    def fill(self, jobs: Sequence[GeneratorJob]) -> None:
        """Write the jobs of a step. The buffer must be in host memory."""
        fields: list[int] = []
        tiles: list[int] = []
        for number, job in enumerate(jobs):
            fields += _record(job)
            for first in range(0, job.length, BLOCK_TOKENS):
                tiles += [number, first]
        for tensor, numbers in ((self.jobs, fields), (self.tiles, tiles)):
            tensor.view(-1).numpy()[: len(numbers)] = numbers
        self.counts[0], self.counts[1] = len(jobs), len(tiles) // NUM_TILE_FIELDS


def step_size(max_num_tokens: int, max_jobs: int) -> int:
    """int32 entries of a GeneratorStep for batches of at most `max_num_tokens` tokens and `max_jobs` instructions."""
    max_tiles = math.ceil(max_num_tokens / BLOCK_TOKENS) + max_jobs
    return NUM_COUNTS + max_jobs * NUM_JOB_FIELDS + max_tiles * NUM_TILE_FIELDS


def _record(job: GeneratorJob) -> list[int]:
    config, offsets = job.layout.config, job.layout.offsets
    values: dict[int, int] = {
        JobField.ROW: job.row,
        JobField.START: job.start,
        JobField.LENGTH: job.length,
        JobField.SLOT: job.slot,
        JobField.RANK: config.r,
        JobField.CAPSULES: config.num_capsules,
        JobField.POOLER: Pooler[config.pooler.upper()],
        JobField.ACTIVATION: Activation[config.activation.upper()],
        JobField.READS_ATTENTION_INPUT: int(config.generator_input == "attention_input"),
        JobField.LAYER_SIZE: job.layout.size,
        JobField.QUERY: offsets.get("pooler.query", ABSENT),
        JobField.WEIGHT: offsets.get("pooler.weight", ABSENT),
        JobField.UP: offsets["up.weight"],
        JobField.BIAS: offsets["up.bias"],
    }
    return [values.get(field, 0) for field in range(NUM_JOB_FIELDS)]
