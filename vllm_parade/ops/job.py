# SPDX-License-Identifier: Apache-2.0
"""One instruction of a step, as kernels and reference alike are told of it."""

from dataclasses import dataclass

from vllm_parade.adapter.config import AdapterConfig

# Addresses that the kernels need of one generator: down, query, weight, up, bias.
NUM_POINTERS = 5


@dataclass(frozen=True)
class GeneratorJob:
    """Read tokens [start, start + length) of the batch with the generators in `slot`, write `row`."""

    row: int
    start: int
    length: int
    slot: int
    config: AdapterConfig
    """Settings of the adapter that holds the slot."""
