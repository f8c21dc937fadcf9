# SPDX-License-Identifier: Apache-2.0
"""The generator of one layer as Triton kernels: three launches for all instructions of a step.

The launch parameters depend only on the number of tokens in the batch, so the CUDA graph of a batch size serves every
step of that size. In a step without instructions, the three launches do nothing.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from vllm_parade.ops.job import BLOCK_TOKENS, NUM_JOB_FIELDS, GeneratorStep
from vllm_parade.ops.kernels import pool_kernel, project_kernel, write_kernel
from vllm_parade.ops.packed import ALIGNMENT

BLOCK_HIDDEN = 128
BLOCK_OUT = 256
MAX_SPLITS = 4
# This many programs fill a large device. With fewer, the hidden size is split.
ENOUGH_PROGRAMS = 64
POOL_ELEMENTS = 4096
# Programs along instructions and along capsules. If there are more instructions or capsules, programs loop.
POOL_PROGRAMS = (32, 4)
WRITE_PROGRAMS = 32


def workspace_size(num_tokens: int, max_rank: int) -> int:
    """Float32 entries that `generate_rows` needs for batches of at most `num_tokens` tokens."""
    # Large batches fill the device and need one part. Smaller batches are split into up to MAX_SPLITS parts.
    most_split = min(num_tokens, ENOUGH_PROGRAMS * BLOCK_TOKENS) * MAX_SPLITS
    return _block_r(max_rank) * (2 * max(num_tokens, most_split) + num_tokens)


def _block_r(max_rank: int) -> int:
    return max(16, triton.next_power_of_2(max_rank))


def _splits(num_tokens: int, hidden_size: int) -> int:
    splits, tiles = 1, triton.cdiv(num_tokens, BLOCK_TOKENS)
    while splits < MAX_SPLITS and splits * tiles < ENOUGH_PROGRAMS and hidden_size >= 2 * splits * BLOCK_HIDDEN:
        splits *= 2
    return splits


def warm_up_sizes(max_num_tokens: int) -> list[int]:
    """Batch sizes that together compile every variant of the kernels, so that no later step compiles one."""
    return sorted({min(max_num_tokens, ENOUGH_PROGRAMS * BLOCK_TOKENS // parts) for parts in (1, 2, MAX_SPLITS)})


# Compiled kernels by kernel, dtype and constants.
_compiled: dict[tuple[Any, ...], Any] = {}


class _Launch:
    """One kernel on one grid. Skips Triton's lookup of the compiled kernel, which takes longer than the kernels.

    One compiled kernel serves all calls, so it may be specialised only on constants. Integers are not specialised, and
    every address must be a multiple of 16.
    """

    def __init__(
        self, kernel: Any, dtype: torch.dtype, grid: tuple[int, int, int], constants: dict[str, int], **options: int
    ) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self._values = tuple(constants.values())
        self._key = (kernel, dtype, *self._values)
        self._run: Callable[..., None] | None = None

    def __call__(self, tensors: tuple[Tensor, ...], *numbers: int) -> None:
        if self._run is not None:
            addresses = [tensor.data_ptr() for tensor in tensors]
            assert not any(address % 16 for address in addresses)
            self._run(*addresses, *numbers, *self._values)
        elif self._key in _compiled:
            self._run = _compiled[self._key][self.grid]
            self(tensors, *numbers)
        else:
            compiled = self.kernel[self.grid](*tensors, *numbers, **self.constants, **self.options)
            if not isinstance(self.kernel, InterpretedFunction):
                _compiled[self._key] = compiled


class _Launches:
    """The three launches for one batch size. Cached per batch size, because launches are host-bound."""

    def __init__(
        self,
        num_tokens: int,
        hidden_size: int,
        stride: int,
        slot_size: int,
        width: int,
        max_rank: int,
        dtype: torch.dtype,
    ) -> None:
        block_r, splits = _block_r(max_rank), _splits(num_tokens, hidden_size)
        # The workspace holds the messages, logits of the same size, and the activated capsules.
        self.logits_start = splits * num_tokens * block_r
        self.workspace_size = 2 * self.logits_start + num_tokens * block_r
        self.split_blocks = triton.cdiv(hidden_size, splits * BLOCK_HIDDEN)
        self.project = _Launch(
            project_kernel,
            dtype,
            # Instructions may end in partial tiles, so allow twice the tiles of the tokens. Beyond that, programs loop.
            (2 * triton.cdiv(num_tokens, BLOCK_TOKENS), splits, 1),
            {
                "STRIDE": stride,
                "HIDDEN_SIZE": hidden_size,
                "SLOT_SIZE": slot_size,
                "BLOCK_R": block_r,
                "NUM_JOB_FIELDS": NUM_JOB_FIELDS,
                "ALIGNMENT": ALIGNMENT,
                "BLOCK_TOKENS": BLOCK_TOKENS,
                "BLOCK_HIDDEN": BLOCK_HIDDEN,
            },
            num_stages=4,
        )
        self.pool = _Launch(
            pool_kernel,
            dtype,
            (min(num_tokens, POOL_PROGRAMS[0]), POOL_PROGRAMS[1], 1),
            {
                "SPLITS": splits,
                "BLOCK_R": block_r,
                "NUM_JOB_FIELDS": NUM_JOB_FIELDS,
                "POOL_ELEMENTS": POOL_ELEMENTS,
            },
            num_warps=16,
        )
        self.write = _Launch(
            write_kernel,
            dtype,
            (triton.cdiv(width, BLOCK_OUT), min(num_tokens, WRITE_PROGRAMS), 1),
            {
                "SLOT_SIZE": slot_size,
                "WIDTH": width,
                "BLOCK_R": block_r,
                "NUM_JOB_FIELDS": NUM_JOB_FIELDS,
                "ALIGNMENT": ALIGNMENT,
                "BLOCK_OUT": BLOCK_OUT,
            },
            # With one warp, each thread sums its own outputs.
            num_warps=1,
        )


_launches = lru_cache(maxsize=1024)(_Launches)


def generate_rows(
    layer_input: Tensor,
    attention_input: Tensor,
    table: Tensor,
    flat: Tensor,
    layer: int,
    step: GeneratorStep,
    workspace: Tensor,
    max_rank: int,
) -> None:
    """Write the rows of all instructions of a step into the table.

    Semantics: table[row] = reference.generate(hidden[start : start + length], ...) for every job

    Args:
        layer_input: [tokens, hidden]
        attention_input: [tokens, hidden]
        table: [rows, width], in the dtype of the inputs
        flat: [slots, entries], packed generators in the same dtype
        layer: index of this layer in the packed generators
        step: the instructions, on the device
        workspace: float32, `workspace_size` entries
        max_rank: largest r in any slot
    """
    stride = layer_input.stride()
    assert stride == attention_input.stride()
    assert stride[1] == 1
    assert table.is_contiguous()
    assert flat.is_contiguous()
    assert layer_input.dtype == attention_input.dtype == table.dtype == flat.dtype
    num_tokens, hidden_size = layer_input.shape
    launches = _launches(num_tokens, hidden_size, stride[0], flat.shape[1], table.shape[1], max_rank, layer_input.dtype)
    assert workspace.numel() >= launches.workspace_size
    counts, jobs, logits_start = step.counts, step.jobs, launches.logits_start
    launches.project(
        (layer_input, attention_input, flat, counts, jobs, step.tiles, workspace),
        *(layer, num_tokens, launches.split_blocks, logits_start),
    )
    launches.pool((counts, jobs, workspace), num_tokens, logits_start)
    launches.write((flat, counts, jobs, workspace, table), layer, 2 * logits_start)
