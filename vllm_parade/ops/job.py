# SPDX-License-Identifier: Apache-2.0
"""The instructions of a step and the generators that read them, laid out as the kernels take them. Needs no Triton."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_parade.adapter import AdapterConfig, GeneratorWeights

# Addresses that the kernels need of one generator: down, query, weight, up, bias; zero where there is none.
NUM_POINTERS = 5
# Columns of `jobs`, one row an instruction: row, start, length, slot, offset in the workspace, r, capsules, pooler,
# activation, whether it reads the attention's input.
NUM_JOB_FIELDS = 10
# Columns of `tiles`, one row a program of `_project`: the instruction and the first token within it.
NUM_TILE_FIELDS = 2
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
    config: AdapterConfig
    """Settings of the adapter that holds the slot."""


@dataclass(frozen=True)
class GeneratorStep:
    """The instructions of a step, on the device and in numbers that fix the launch."""

    jobs: Tensor
    """[instructions, NUM_JOB_FIELDS] int32"""
    tiles: Tensor
    """[tiles, NUM_TILE_FIELDS] int32"""
    num_tokens: int
    """Tokens of all instructions together."""
    max_rank: int
    max_capsules: int
    max_capsule_size: int

    @classmethod
    def make(cls, jobs: Sequence[GeneratorJob], device: torch.device) -> "GeneratorStep":
        """Lay the jobs out on the device, by one copy that nobody waits for."""
        lengths = [job.length for job in jobs]
        offsets = [sum(lengths[:number]) for number in range(len(jobs))]
        fields: list[int] = []
        tiles: list[int] = []
        for number, (job, offset) in enumerate(zip(jobs, offsets, strict=True)):
            fields += [job.row, job.start, job.length, job.slot, offset, *_kind(job.config)]
            for first in range(0, job.length, BLOCK_TOKENS):
                tiles += [number, first]
        packed = torch.tensor(fields + tiles, dtype=torch.int32, pin_memory=device.type == "cuda")
        packed = packed.to(device, non_blocking=True)
        configs = [job.config for job in jobs]
        return cls(
            jobs=packed[: len(fields)].view(-1, NUM_JOB_FIELDS),
            tiles=packed[len(fields) :].view(-1, NUM_TILE_FIELDS),
            num_tokens=sum(lengths),
            max_rank=max(config.r for config in configs),
            max_capsules=max(config.num_capsules for config in configs),
            # The last capsule takes what division leaves over (pooler last_token only).
            max_capsule_size=max(c.r - (c.num_capsules - 1) * (c.r // c.num_capsules) for c in configs),
        )


def _kind(config: AdapterConfig) -> tuple[int, ...]:
    return (
        config.r,
        config.num_capsules,
        POOLER_NUMBERS[config.pooler],
        ACTIVATION_NUMBERS[config.activation],
        int(config.generator_input == "attention_input"),
    )


def packed_generator(weights: GeneratorWeights) -> tuple[list[Tensor], list[int]]:
    """A generator as the kernels read it: tensors to keep as long as it is used, and its row of `pointers`."""
    joined = None if weights.weight is None else weights.weight.permute(1, 0, 2).reshape(len(weights.down), -1)
    given = [weights.down, weights.query, joined, weights.up, weights.bias]
    tensors = [None if tensor is None else tensor.contiguous() for tensor in given]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return [tensor for tensor in tensors if tensor is not None], addresses
