# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the generator, for all instructions of a step and all their adapters. `generate` launches them.

1. `project_kernel` multiplies the tokens of all instructions by W_down, W_k and v_k. With few tokens, it splits the
   hidden size, so that one prompt fills the device. The next kernel adds up the parts, always in the same order.
2. `pool_kernel` computes both routing passes for every instruction and capsule, and the activation.
3. `write_kernel` computes the up projection and writes the table's rows.

The kernels read the number of instructions and their settings from device memory, and distribute the instructions over
their programs. Equations are those of `reference.generate`, with one difference: H' is not rounded to the model's dtype
between (6) and (7).
"""

import triton
import triton.language as tl

from vllm_parade.ops.job import Activation, JobField, Pooler

ROW = tl.constexpr(int(JobField.ROW))
START = tl.constexpr(int(JobField.START))
LENGTH = tl.constexpr(int(JobField.LENGTH))
SLOT = tl.constexpr(int(JobField.SLOT))
RANK = tl.constexpr(int(JobField.RANK))
CAPSULES = tl.constexpr(int(JobField.CAPSULES))
POOLER = tl.constexpr(int(JobField.POOLER))
ACTIVATION = tl.constexpr(int(JobField.ACTIVATION))
READS_ATTENTION_INPUT = tl.constexpr(int(JobField.READS_ATTENTION_INPUT))
LAYER_SIZE = tl.constexpr(int(JobField.LAYER_SIZE))
QUERY = tl.constexpr(int(JobField.QUERY))
WEIGHT = tl.constexpr(int(JobField.WEIGHT))
UP = tl.constexpr(int(JobField.UP))
BIAS = tl.constexpr(int(JobField.BIAS))
ATTENTIONAL_CAPSULE = tl.constexpr(int(Pooler.ATTENTIONAL_CAPSULE))
LAST_TOKEN = tl.constexpr(int(Pooler.LAST_TOKEN))
GELU = tl.constexpr(int(Activation.GELU))
RELU = tl.constexpr(int(Activation.RELU))
SILU = tl.constexpr(int(Activation.SILU))


@triton.jit(do_not_specialize=["layer", "num_tokens", "split_blocks", "logits_start"])
def project_kernel(
    layer_input,
    attention_input,
    flat,
    counts,
    jobs,
    tiles,
    workspace,
    layer,
    num_tokens,
    split_blocks,
    logits_start,
    STRIDE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_JOB_FIELDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_HIDDEN)
    split = tl.program_id(1)
    messages = workspace + split.to(tl.int64) * num_tokens * BLOCK_R
    for tile in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        job = jobs + tl.load(tiles + tile * 2) * NUM_JOB_FIELDS
        first = tl.load(tiles + tile * 2 + 1)
        start, length, slot = tl.load(job + START), tl.load(job + LENGTH), tl.load(job + SLOT)
        r, capsules, layer_size = tl.load(job + RANK), tl.load(job + CAPSULES), tl.load(job + LAYER_SIZE)
        query, weight = tl.load(job + QUERY), tl.load(job + WEIGHT)
        # Packing aligns every tensor to ALIGNMENT entries.
        down = flat + tl.multiple_of(slot.to(tl.int64) * SLOT_SIZE + layer.to(tl.int64) * layer_size, ALIGNMENT)
        hidden = layer_input
        if tl.load(job + READS_ATTENTION_INPUT) == 1:
            hidden = attention_input
        tokens = first + tl.arange(0, BLOCK_TOKENS)
        inside = tokens < length
        rows = (start + tokens).to(tl.int64)
        projected = tl.zeros([BLOCK_TOKENS, BLOCK_R], dtype=tl.float32)
        for block in range(split * split_blocks, (split + 1) * split_blocks):
            # The compiler sees that d is a multiple of BLOCK_HIDDEN, and uses wide loads.
            d = block * BLOCK_HIDDEN
            live = d + depth < HIDDEN_SIZE
            x = tl.load(
                hidden + rows[:, None] * STRIDE + (d + depth)[None, :],
                mask=inside[:, None] & live[None, :],
                other=0.0,
            )
            w = tl.load(
                down + columns[None, :] * HIDDEN_SIZE + (d + depth)[:, None],
                mask=(columns < r)[None, :] & live[:, None],
                other=0.0,
            )
            projected = tl.dot(x, w, projected, input_precision="ieee")

        # Messages and logits are linear in H', so each split writes its part of them.
        out = messages + rows[:, None] * BLOCK_R + columns[None, :]
        sent = inside[:, None] & (columns < r)[None, :]
        if weight >= 0:
            square = (inner < r)[:, None] & (columns < r)[None, :]
            w_k = tl.load(down + weight + inner[:, None] * r + columns[None, :], mask=square, other=0.0)
            tl.store(out, tl.dot(projected, w_k.to(tl.float32), input_precision="ieee"), mask=sent)
        else:
            tl.store(out, projected, mask=sent)
        if query >= 0:
            asked = (inner < r)[:, None] & (columns < capsules)[None, :]
            v_k = tl.load(down + query + columns[None, :] * r + inner[:, None], mask=asked, other=0.0)
            tl.store(out + logits_start, tl.dot(projected, v_k.to(tl.float32), input_precision="ieee"), mask=sent)


@triton.jit
def _activate(z, activation):
    relu = tl.maximum(z, 0.0)
    silu = z * tl.sigmoid(z)
    gelu = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tanh = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return tl.where(
        activation == GELU, gelu, tl.where(activation == RELU, relu, tl.where(activation == SILU, silu, tanh))
    )


@triton.jit
def _load_parts(values, place, mask, part, SPLITS: tl.constexpr):
    total = tl.load(values + place, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(values + place + split * part, mask=mask, other=0.0)
    return total


@triton.jit
def _pool_capsule(
    messages,
    logits,
    part,
    start,
    length,
    begin,
    size,
    capsule,
    pooler,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
):
    entries = tl.arange(0, BLOCK_C)
    live = entries < size
    columns = begin + entries
    z = tl.zeros([BLOCK_C], dtype=tl.float32)
    if pooler == LAST_TOKEN:
        z = _load_parts(messages, (start + length - 1).to(tl.int64) * BLOCK_R + columns, live, part, SPLITS)
    else:
        for routing_pass in tl.static_range(2):
            # Softmax over the tokens, block by block: running maximum, sum of exponentials, weighted sum of messages.
            peak = float("-inf")
            total = 0.0
            pooled = tl.zeros([BLOCK_C], dtype=tl.float32)
            for t in range(0, length, BLOCK_TOKENS):
                tokens = t + tl.arange(0, BLOCK_TOKENS)
                inside = tokens < length
                place = (start + tokens).to(tl.int64) * BLOCK_R
                both = inside[:, None] & live[None, :]
                message = _load_parts(messages, place[:, None] + columns[None, :], both, part, SPLITS)
                logit = tl.zeros([BLOCK_TOKENS], dtype=tl.float32)
                if pooler == ATTENTIONAL_CAPSULE:
                    logit += _load_parts(logits, place + capsule, inside, part, SPLITS)
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
    return z


@triton.jit(do_not_specialize=["num_tokens", "logits_start"])
def pool_kernel(
    counts,
    jobs,
    workspace,
    num_tokens,
    logits_start,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_JOB_FIELDS: tl.constexpr,
    POOL_ELEMENTS: tl.constexpr,
):
    part = num_tokens.to(tl.int64) * BLOCK_R
    logits = workspace + logits_start
    activated = logits + logits_start
    for number in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        job = jobs + number * NUM_JOB_FIELDS
        start, length = tl.load(job + START), tl.load(job + LENGTH)
        r, capsules, pooler, activation = (
            tl.load(job + RANK),
            tl.load(job + CAPSULES),
            tl.load(job + POOLER),
            tl.load(job + ACTIVATION),
        )
        for capsule in range(tl.program_id(1), capsules, tl.num_programs(1)):
            # Last-token pooling has no capsules, but its r entries are split in the same way. The last part takes the
            # remainder.
            size = r // capsules
            begin = capsule * size
            if capsule == capsules - 1:
                size = r - begin
            out = activated + number * BLOCK_R + begin
            # The paper's capsules have 3 entries. Blocks for the largest adapter would leave most lanes idle.
            if size <= 4:
                small = _pool_capsule(
                    workspace, logits, part, start, length, begin, size, capsule, pooler,
                    POOL_ELEMENTS // 4, BLOCK_R, 4, SPLITS,
                )  # fmt: skip
                few = tl.arange(0, 4)
                tl.store(out + few, _activate(small, activation), mask=few < size)
            else:
                large = _pool_capsule(
                    workspace, logits, part, start, length, begin, size, capsule, pooler,
                    POOL_ELEMENTS // BLOCK_R, BLOCK_R, BLOCK_R, SPLITS,
                )  # fmt: skip
                many = tl.arange(0, BLOCK_R)
                tl.store(out + many, _activate(large, activation), mask=many < size)


@triton.jit(do_not_specialize=["layer", "activated_start"])
def write_kernel(
    flat,
    counts,
    jobs,
    workspace,
    table,
    layer,
    activated_start,
    SLOT_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_JOB_FIELDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live = outputs < WIDTH
    columns = tl.arange(0, BLOCK_R)
    element = table.dtype.element_ty
    for number in range(tl.program_id(1), tl.load(counts), tl.num_programs(1)):
        job = jobs + number * NUM_JOB_FIELDS
        row, slot, r, layer_size = (
            tl.load(job + ROW),
            tl.load(job + SLOT),
            tl.load(job + RANK),
            tl.load(job + LAYER_SIZE),
        )
        up, bias = tl.load(job + UP), tl.load(job + BIAS)
        generator = slot.to(tl.int64) * SLOT_SIZE + layer.to(tl.int64) * layer_size
        z = tl.load(workspace + activated_start + number * BLOCK_R + columns, mask=columns < r, other=0.0)
        # The projection's input is in the model's dtype, as for every other linear layer.
        z = z.to(element).to(tl.float32)
        w = tl.load(
            flat + tl.multiple_of(generator + up, ALIGNMENT) + columns[:, None] * WIDTH + outputs[None, :],
            mask=(columns < r)[:, None] & live[None, :],
            other=0.0,
        )
        b = tl.load(flat + tl.multiple_of(generator + bias, ALIGNMENT) + outputs, mask=live, other=0.0)
        vector = tl.sum(w.to(tl.float32) * z[:, None], axis=0) + b.to(tl.float32)
        tl.store(table + row.to(tl.int64) * WIDTH + outputs, vector.to(element), mask=live)
