# SPDX-License-Identifier: Apache-2.0
"""The generator of one layer as Triton kernels: three launches for all instructions of a step.

The launch depends on the number of tokens in the batch alone. So a CUDA graph of a batch size serves every step of that
size, and a step without instructions costs it three launches that do nothing.
"""

import triton
from torch import Tensor

from vllm_parade.ops.job import BLOCK_TOKENS, NUM_JOB_FIELDS, GeneratorStep
from vllm_parade.ops.kernels import pool_kernel, project_kernel, write_kernel
from vllm_parade.ops.packed import ALIGNMENT

BLOCK_HIDDEN = 128
BLOCK_OUT = 256
MAX_SPLITS = 8
# Programs that fill a large device; below this, the hidden size is split.
ENOUGH_PROGRAMS = 128
POOL_ELEMENTS = 4096
# Programs along instructions and along capsules; where there are more, a program takes several.
POOL_PROGRAMS = (32, 4)
WRITE_PROGRAMS = 8


def workspace_size(num_tokens: int, max_rank: int) -> int:
    """Float32 numbers that `generate_rows` needs for batches of at most `num_tokens` tokens."""
    # Splitting stops where tokens fill the device, so large batches need one part, small ones up to MAX_SPLITS.
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
    """Batch sizes that between them launch every variant of the kernels, so that none is compiled in a later step."""
    return sorted({min(max_num_tokens, ENOUGH_PROGRAMS * BLOCK_TOKENS // parts) for parts in (1, 2, 4, MAX_SPLITS)})


def generate_rows(
    layer_input: Tensor,
    attention_input: Tensor,
    table: Tensor,
    flat: Tensor,
    offsets: Tensor,
    step: GeneratorStep,
    workspace: Tensor,
    max_rank: int,
) -> None:
    """Write the table's rows of all instructions of a step.

    Semantics: table[row] = reference.generate(hidden[start : start + length], ...) for every job, 1 without a generator

    Args:
        layer_input: [tokens, hidden]
        attention_input: [tokens, hidden]
        table: [rows, width], in the dtype of the inputs
        flat: [slots, entries], packed generators in the same dtype
        offsets: [slots, NUM_TENSORS] int64, this layer's tensors in `flat`
        step: the instructions, on the device
        workspace: float32, `workspace_size` numbers
        max_rank: largest r in any slot
    """
    assert layer_input.stride() == attention_input.stride()
    assert layer_input.stride(1) == table.stride(1) == flat.stride(1) == offsets.stride(1) == 1
    assert layer_input.dtype == attention_input.dtype == table.dtype == flat.dtype
    (num_tokens, hidden_size), width = layer_input.shape, table.shape[1]
    block_r = _block_r(max_rank)
    splits = _splits(num_tokens, hidden_size)
    part = splits * num_tokens * block_r
    assert workspace.numel() >= 2 * part + num_tokens * block_r
    messages, logits, activated = workspace[:part], workspace[part : 2 * part], workspace[2 * part :]
    split_size = triton.cdiv(triton.cdiv(hidden_size, splits), BLOCK_HIDDEN) * BLOCK_HIDDEN
    where = (offsets, offsets.stride(0), step.counts, step.jobs)
    sizes = {"NUM_JOB_FIELDS": NUM_JOB_FIELDS, "BLOCK_R": block_r}
    # Instructions end where they like: twice as many tiles as tokens need are a comfortable upper estimate.
    project_kernel[2 * triton.cdiv(num_tokens, BLOCK_TOKENS), splits](
        layer_input,
        attention_input,
        layer_input.stride(0),
        flat,
        flat.stride(0),
        *where,
        step.tiles,
        messages,
        logits,
        hidden_size,
        num_tokens,
        split_size,
        ALIGNMENT=ALIGNMENT,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_HIDDEN=BLOCK_HIDDEN,
        num_stages=4,
        **sizes,
    )
    pool_kernel[min(num_tokens, POOL_PROGRAMS[0]), POOL_PROGRAMS[1]](
        *where, messages, logits, activated, num_tokens, POOL_ELEMENTS=POOL_ELEMENTS, SPLITS=splits, **sizes
    )
    write_kernel[triton.cdiv(width, BLOCK_OUT), min(num_tokens, WRITE_PROGRAMS)](
        flat,
        flat.stride(0),
        *where,
        activated,
        table,
        table.stride(0),
        width,
        ALIGNMENT=ALIGNMENT,
        BLOCK_OUT=BLOCK_OUT,
        **sizes,
    )
