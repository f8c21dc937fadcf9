# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the generator: three launches a layer for all instructions of a step, whatever their adapters.

1. `_project`: the tokens of all instructions through W_down, W_k and v_k. Split over the hidden size where tokens are
   few, so that a single prompt fills the device; the parts are added up in the next kernel, always in the same order.
2. `_pool`: both routing passes, one program for every instruction and capsule, and the activation.
3. `_write`: the projection up, into the table's rows.

Adapters lie where the allocator put them, each in its own size; a layer's `pointers` say where. Equations as in
`reference.generate`, with one difference: H' is not rounded to the model's dtype between (6) and (7).

Longer than 300 lines, since three kernels that share one workspace and their one launcher are read together.
"""

import triton
import triton.language as tl
from torch import Tensor

from vllm_parade.ops.job import BLOCK_TOKENS, NUM_JOB_FIELDS, NUM_POINTERS, GeneratorStep

BLOCK_HIDDEN = 128
BLOCK_OUT = 256
MAX_SPLITS = 8
# Programs that fill a large device; below this, the hidden size is split.
ENOUGH_PROGRAMS = 128
POOL_ELEMENTS = 4096


@triton.jit
def _project(
    layer_input,
    attention_input,
    stride,
    pointers,
    jobs,
    tiles,
    messages,
    logits,
    hidden_size,
    num_tokens,
    split_size,
    NUM_JOB_FIELDS: tl.constexpr,
    NUM_POINTERS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    job = jobs + tl.load(tiles + tile * 2) * NUM_JOB_FIELDS
    first = tl.load(tiles + tile * 2 + 1)
    start, length, slot = tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    offset, r, capsules, pooler = tl.load(job + 4), tl.load(job + 5), tl.load(job + 6), tl.load(job + 7)
    pointer = pointers + slot * NUM_POINTERS
    down_address = tl.load(pointer)
    if down_address == 0:
        return
    element = layer_input.dtype.element_ty
    down = down_address.to(tl.pointer_type(element))
    hidden = layer_input
    if tl.load(job + 9) == 1:
        hidden = attention_input

    tokens = first + tl.arange(0, BLOCK_TOKENS)
    inside = tokens < length
    columns = tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_HIDDEN)
    rows = (start + tokens).to(tl.int64) * stride
    projected = tl.zeros([BLOCK_TOKENS, BLOCK_R], dtype=tl.float32)
    begin = split * split_size
    for d in range(begin, begin + split_size, BLOCK_HIDDEN):
        live = d + depth < hidden_size
        x = tl.load(hidden + rows[:, None] + (d + depth)[None, :], mask=inside[:, None] & live[None, :], other=0.0)
        w = tl.load(
            down + columns[None, :] * hidden_size + (d + depth)[:, None],
            mask=(columns < r)[None, :] & live[:, None],
            other=0.0,
        )
        projected = tl.dot(x, w, projected, input_precision="ieee")

    # Messages and logits are linear in H', so each split may send its part.
    place = split.to(tl.int64) * num_tokens + offset + tokens
    out = place[:, None] * BLOCK_R + columns[None, :]
    inner = tl.arange(0, BLOCK_R)
    if pooler == 2:
        tl.store(messages + out, projected, mask=inside[:, None])
    else:
        # W_k side by side: [r, r], column k * (r / capsules) + c.
        weight = tl.load(pointer + 2).to(tl.pointer_type(element))
        both = (inner < r)[:, None] & (columns < r)[None, :]
        w = tl.load(weight + inner[:, None] * r + columns[None, :], mask=both, other=0.0).to(tl.float32)
        tl.store(messages + out, tl.dot(projected, w, input_precision="ieee"), mask=inside[:, None])
    if pooler == 0:
        query = tl.load(pointer + 1).to(tl.pointer_type(element))
        both = (inner < r)[:, None] & (columns < capsules)[None, :]
        q = tl.load(query + columns[None, :] * r + inner[:, None], mask=both, other=0.0).to(tl.float32)
        tl.store(logits + out, tl.dot(projected, q, input_precision="ieee"), mask=inside[:, None])


@triton.jit
def _activate(z, activation):
    relu = tl.maximum(z, 0.0)
    silu = z * tl.sigmoid(z)
    gelu = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tanh = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return tl.where(activation == 0, gelu, tl.where(activation == 1, relu, tl.where(activation == 2, silu, tanh)))


@triton.jit
def _load_parts(values, place, mask, num_tokens, stride, SPLITS: tl.constexpr):
    total = tl.load(values + place, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(values + place + split * num_tokens.to(tl.int64) * stride, mask=mask, other=0.0)
    return total


@triton.jit
def _pool(
    pointers,
    jobs,
    messages,
    logits,
    activated,
    num_tokens,
    NUM_JOB_FIELDS: tl.constexpr,
    NUM_POINTERS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
):
    number, capsule = tl.program_id(0), tl.program_id(1)
    job = jobs + number * NUM_JOB_FIELDS
    length, slot, offset = tl.load(job + 2), tl.load(job + 3), tl.load(job + 4)
    r, capsules, pooler, activation = tl.load(job + 5), tl.load(job + 6), tl.load(job + 7), tl.load(job + 8)
    if capsule >= capsules or tl.load(pointers + slot * NUM_POINTERS) == 0:
        return
    # Last-token pooling knows no capsules, but its r entries are shared out among the programs just the same; the last
    # one takes what division leaves over.
    size = r // capsules
    begin = capsule * size
    if capsule == capsules - 1:
        size = r - begin
    entries = tl.arange(0, BLOCK_C)
    live = entries < size
    columns = begin + entries
    if pooler == 2:
        z = _load_parts(
            messages, (offset + length - 1).to(tl.int64) * BLOCK_R + columns, live, num_tokens, BLOCK_R, SPLITS
        )
    else:
        z = tl.zeros([BLOCK_C], dtype=tl.float32)
        for routing_pass in tl.static_range(2):
            # Softmax over the tokens, block by block: running maximum, sum of exponentials, weighted sum of messages.
            peak = float("-inf")
            total = 0.0
            pooled = tl.zeros([BLOCK_C], dtype=tl.float32)
            for t in range(0, length, BLOCK_TOKENS):
                tokens = t + tl.arange(0, BLOCK_TOKENS)
                inside = tokens < length
                place = (offset + tokens).to(tl.int64) * BLOCK_R
                message = _load_parts(
                    messages,
                    place[:, None] + columns[None, :],
                    inside[:, None] & live[None, :],
                    num_tokens,
                    BLOCK_R,
                    SPLITS,
                )
                logit = tl.zeros([BLOCK_TOKENS], dtype=tl.float32)
                if pooler == 0:
                    logit += _load_parts(logits, place + capsule, inside, num_tokens, BLOCK_R, SPLITS)
                if routing_pass == 1:
                    logit += tl.sum(message * z[None, :], axis=1)
                logit = tl.where(inside, logit, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(logit, axis=0))
                shrink = tl.exp(peak - new_peak)
                weight = tl.exp(logit - new_peak)
                total = total * shrink + tl.sum(weight, axis=0)
                pooled = pooled * shrink + tl.sum(weight[:, None] * message, axis=0)
                peak = new_peak
            pooled = pooled / total
            norm = tl.sum(pooled * pooled, axis=0)
            z = pooled * (tl.sqrt(norm) / (1.0 + norm))
    tl.store(activated + number * BLOCK_R + columns, _activate(z, activation), mask=live)


@triton.jit
def _write(
    pointers,
    jobs,
    activated,
    table,
    table_stride,
    width,
    NUM_JOB_FIELDS: tl.constexpr,
    NUM_POINTERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    number = tl.program_id(0)
    job = jobs + number * NUM_JOB_FIELDS
    row, slot, r = tl.load(job), tl.load(job + 3), tl.load(job + 5)
    pointer = pointers + slot * NUM_POINTERS
    up_address = tl.load(pointer + 3)
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live = outputs < width
    target = table + row.to(tl.int64) * table_stride + outputs
    element = table.dtype.element_ty
    if up_address == 0:
        tl.store(target, tl.full([BLOCK_OUT], 1.0, dtype=element), mask=live)
        return
    up = up_address.to(tl.pointer_type(element))
    bias = tl.load(pointer + 4).to(tl.pointer_type(element))
    columns = tl.arange(0, BLOCK_R)
    z = tl.load(activated + number * BLOCK_R + columns, mask=columns < r, other=0.0)
    # The projection's input is in the model's dtype, as for every other linear layer.
    z = z.to(element).to(tl.float32)
    w = tl.load(
        up + outputs.to(tl.int64)[:, None] * r + columns[None, :],
        mask=live[:, None] & (columns < r)[None, :],
        other=0.0,
    )
    vector = tl.sum(w.to(tl.float32) * z[None, :], axis=1) + tl.load(bias + outputs, mask=live, other=0.0).to(
        tl.float32
    )
    tl.store(target, vector.to(element), mask=live)


def workspace_size(num_tokens: int, max_rank: int) -> int:
    """Float32 numbers that `generate_rows` needs for steps of at most `num_tokens` instruction tokens."""
    block_r = max(16, triton.next_power_of_2(max_rank))
    # Splitting stops where tokens fill the device, so long steps need one part, short ones up to MAX_SPLITS.
    most_split = min(num_tokens, ENOUGH_PROGRAMS * BLOCK_TOKENS) * MAX_SPLITS
    return 2 * block_r * max(num_tokens, most_split) + block_r * num_tokens


def _splits(num_tiles: int, hidden_size: int) -> int:
    splits = 1
    while splits < MAX_SPLITS and splits * num_tiles < ENOUGH_PROGRAMS and hidden_size >= 2 * splits * BLOCK_HIDDEN:
        splits *= 2
    return splits


def generate_rows(
    layer_input: Tensor,
    attention_input: Tensor,
    table: Tensor,
    pointers: Tensor,
    step: GeneratorStep,
    workspace: Tensor,
) -> None:
    """Write the table's rows of all instructions of a step.

    Semantics: table[row] = reference.generate(hidden[start : start + length], ...) for every job, 1 without a generator

    Args:
        layer_input: [tokens, hidden]
        attention_input: [tokens, hidden]
        table: [rows, width], in the dtype of the inputs
        pointers: [slots, NUM_POINTERS] int64, addresses of down [r, hidden], query [k, r], weight [r, r] (all W_k side
            by side), up [width, r] and bias [width], contiguous and in the same dtype
        step: the instructions
        workspace: float32, `workspace_size` numbers
    """
    assert layer_input.stride() == attention_input.stride()
    assert layer_input.stride(1) == table.stride(1) == 1
    assert layer_input.dtype == attention_input.dtype == table.dtype
    num_jobs, num_tiles = len(step.jobs), len(step.tiles)
    hidden_size, width = layer_input.shape[1], table.shape[1]
    block_r = max(16, triton.next_power_of_2(step.max_rank))
    block_c = triton.next_power_of_2(step.max_capsule_size)
    splits = _splits(num_tiles, hidden_size)
    part = splits * step.num_tokens * block_r
    assert workspace.numel() >= 2 * part + num_jobs * block_r
    messages, logits, activated = workspace[:part], workspace[part : 2 * part], workspace[2 * part :]
    split_size = triton.cdiv(triton.cdiv(hidden_size, splits), BLOCK_HIDDEN) * BLOCK_HIDDEN
    sizes = {"NUM_JOB_FIELDS": NUM_JOB_FIELDS, "NUM_POINTERS": NUM_POINTERS, "BLOCK_R": block_r}
    _project[num_tiles, splits](
        layer_input,
        attention_input,
        layer_input.stride(0),
        pointers,
        step.jobs,
        step.tiles,
        messages,
        logits,
        hidden_size,
        step.num_tokens,
        split_size,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_HIDDEN=BLOCK_HIDDEN,
        num_stages=4,
        **sizes,
    )
    _pool[num_jobs, step.max_capsules](
        pointers,
        step.jobs,
        messages,
        logits,
        activated,
        step.num_tokens,
        BLOCK_TOKENS=max(16, POOL_ELEMENTS // block_c),
        BLOCK_C=block_c,
        SPLITS=splits,
        **sizes,
    )
    _write[num_jobs, triton.cdiv(width, BLOCK_OUT)](
        pointers,
        step.jobs,
        activated,
        table,
        table.stride(0),
        width,
        BLOCK_OUT=BLOCK_OUT,
        **sizes,
    )
