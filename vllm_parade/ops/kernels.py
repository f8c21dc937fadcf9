# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the generator, for all instructions of a step, whatever their adapters; `generate` launches them.

1. `project_kernel`: the tokens of all instructions through W_down, W_k and v_k. Split over the hidden size where tokens
   are few, so that one prompt fills the device; the next kernel adds the parts up, always in the same order.
2. `pool_kernel`: both routing passes for every instruction and capsule, and the activation.
3. `write_kernel`: the projection up, into the table's rows.

How many instructions there are, and what they ask for, the kernels read on the device and share out among their
programs. Equations as in `reference.generate`, with one difference: H' is not rounded to the model's dtype between (6)
and (7).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "split_size"], do_not_specialize_on_alignment=["offsets"])
def project_kernel(
    layer_input,
    attention_input,
    stride,
    flat,
    slot_size,
    offsets,
    offsets_stride,
    counts,
    jobs,
    tiles,
    messages,
    logits,
    hidden_size,
    num_tokens,
    split_size,
    NUM_JOB_FIELDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_HIDDEN)
    split = tl.program_id(1)
    part = split.to(tl.int64) * num_tokens * BLOCK_R
    for tile in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        job = jobs + tl.load(tiles + tile * 2) * NUM_JOB_FIELDS
        first = tl.load(tiles + tile * 2 + 1)
        start, length, slot = tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        r, capsules = tl.load(job + 4), tl.load(job + 5)
        place = offsets + slot * offsets_stride
        down, query, weight = tl.load(place), tl.load(place + 1), tl.load(place + 2)
        if down >= 0:
            hidden = layer_input
            if tl.load(job + 8) == 1:
                hidden = attention_input
            generator = flat + slot.to(tl.int64) * slot_size
            # As the packing promises.
            down = tl.multiple_of(down, ALIGNMENT)
            tokens = first + tl.arange(0, BLOCK_TOKENS)
            inside = tokens < length
            rows = (start + tokens).to(tl.int64)
            projected = tl.zeros([BLOCK_TOKENS, BLOCK_R], dtype=tl.float32)
            for d in range(split * split_size, (split + 1) * split_size, BLOCK_HIDDEN):
                live = d + depth < hidden_size
                x = tl.load(
                    hidden + rows[:, None] * stride + (d + depth)[None, :],
                    mask=inside[:, None] & live[None, :],
                    other=0.0,
                )
                w = tl.load(
                    generator + down + columns[None, :] * hidden_size + (d + depth)[:, None],
                    mask=(columns < r)[None, :] & live[:, None],
                    other=0.0,
                )
                projected = tl.dot(x, w, projected, input_precision="ieee")

            # Messages and logits are linear in H', so each split may send its part.
            out = part + rows[:, None] * BLOCK_R + columns[None, :]
            sent = inside[:, None] & (columns < r)[None, :]
            square = (inner < r)[:, None] & (columns < r)[None, :]
            if weight >= 0:
                w_k = tl.load(generator + weight + inner[:, None] * r + columns[None, :], mask=square, other=0.0)
                tl.store(messages + out, tl.dot(projected, w_k.to(tl.float32), input_precision="ieee"), mask=sent)
            else:
                tl.store(messages + out, projected, mask=sent)
            if query >= 0:
                asked = (inner < r)[:, None] & (columns < capsules)[None, :]
                v_k = tl.load(generator + query + columns[None, :] * r + inner[:, None], mask=asked, other=0.0)
                tl.store(logits + out, tl.dot(projected, v_k.to(tl.float32), input_precision="ieee"), mask=sent)


@triton.jit
def _activate(z, activation):
    relu = tl.maximum(z, 0.0)
    silu = z * tl.sigmoid(z)
    gelu = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tanh = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return tl.where(activation == 0, gelu, tl.where(activation == 1, relu, tl.where(activation == 2, silu, tanh)))


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
    if pooler == 2:
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
                if pooler == 0:
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


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["offsets"])
def pool_kernel(
    offsets,
    offsets_stride,
    counts,
    jobs,
    messages,
    logits,
    activated,
    num_tokens,
    NUM_JOB_FIELDS: tl.constexpr,
    POOL_ELEMENTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
):
    part = num_tokens.to(tl.int64) * BLOCK_R
    for number in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        job = jobs + number * NUM_JOB_FIELDS
        start, length, slot = tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        r, capsules, pooler, activation = tl.load(job + 4), tl.load(job + 5), tl.load(job + 6), tl.load(job + 7)
        if tl.load(offsets + slot * offsets_stride) >= 0:
            for capsule in range(tl.program_id(1), capsules, tl.num_programs(1)):
                # Last-token pooling knows no capsules, but its r entries are shared out among the programs just the
                # same; the last one takes what division leaves over.
                size = r // capsules
                begin = capsule * size
                if capsule == capsules - 1:
                    size = r - begin
                out = activated + number * BLOCK_R + begin
                # The paper's capsules hold 3 entries: sizing blocks for the largest adapter would idle most lanes.
                if size <= 4:
                    small = _pool_capsule(
                        messages, logits, part, start, length, begin, size, capsule, pooler,
                        POOL_ELEMENTS // 4, BLOCK_R, 4, SPLITS,
                    )  # fmt: skip
                    few = tl.arange(0, 4)
                    tl.store(out + few, _activate(small, activation), mask=few < size)
                else:
                    large = _pool_capsule(
                        messages, logits, part, start, length, begin, size, capsule, pooler,
                        POOL_ELEMENTS // BLOCK_R, BLOCK_R, BLOCK_R, SPLITS,
                    )  # fmt: skip
                    many = tl.arange(0, BLOCK_R)
                    tl.store(out + many, _activate(large, activation), mask=many < size)


@triton.jit(do_not_specialize_on_alignment=["offsets"])
def write_kernel(
    flat,
    slot_size,
    offsets,
    offsets_stride,
    counts,
    jobs,
    activated,
    table,
    table_stride,
    width,
    NUM_JOB_FIELDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live = outputs < width
    columns = tl.arange(0, BLOCK_R)
    for number in range(tl.program_id(1), tl.load(counts), tl.num_programs(1)):
        job = jobs + number * NUM_JOB_FIELDS
        row, slot, r = tl.load(job), tl.load(job + 3), tl.load(job + 4)
        place = offsets + slot * offsets_stride
        up, bias = tl.load(place + 3), tl.load(place + 4)
        vector = tl.full([BLOCK_OUT], 1.0, dtype=tl.float32)
        if up >= 0:
            generator = flat + slot.to(tl.int64) * slot_size
            z = tl.load(activated + number * BLOCK_R + columns, mask=columns < r, other=0.0)
            # The projection's input is in the model's dtype, as for every other linear layer.
            z = z.to(table.dtype.element_ty).to(tl.float32)
            w = tl.load(
                generator + tl.multiple_of(up, ALIGNMENT) + outputs[:, None] * r + columns[None, :],
                mask=live[:, None] & (columns < r)[None, :],
                other=0.0,
            )
            b = tl.load(generator + tl.multiple_of(bias, ALIGNMENT) + outputs, mask=live, other=0.0)
            vector = tl.sum(w.to(tl.float32) * z[None, :], axis=1) + b.to(tl.float32)
        target = table + row.to(tl.int64) * table_stride + outputs
        tl.store(target, vector.to(table.dtype.element_ty), mask=live)
