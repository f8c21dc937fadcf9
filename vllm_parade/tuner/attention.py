# SPDX-License-Identifier: Apache-2.0
"""xformers' attention for training on GPUs: `from_pretrained(..., attn_implementation="xformers")`.

Supports packed batches (one row of several sequences, whose position ids restart) and batches without padding. Needs a
GPU and the package xformers. Eager and sdpa attention also support packed batches, on any device.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "xformers"
# Attribute of the position ids that caches the first layer's bias for the other layers of a forward pass.
BIAS = "parade_bias"


def sequence_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the sequences in a packed row. Each begins where the position is not the previous one plus 1.

    Args:
        position_ids: [1, tokens]
    """
    starts = (position_ids[0].diff(prepend=position_ids[0, :1] - 2) != 1).nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([position_ids.shape[1]])])
    return (ends - starts).tolist()


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within every sequence.

    Args:
        query: [batch, heads, tokens, head size]
        key, value: [batch, key heads, tokens, head size]
        position_ids: [batch, tokens]

    Raises:
        ValueError: the batch has padding.
    """
    from xformers.ops import memory_efficient_attention

    if attention_mask is not None:
        raise ValueError("xformers attention takes no padding; pack the batch (--packed), or use sdpa attention")
    groups = key.shape[1]
    # [batch, tokens, key heads, query heads per key head, head size]
    q = query.transpose(1, 2).unflatten(2, (groups, -1))
    k, v = (part.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, q.shape[3], -1) for part in (key, value))
    bias = _bias(q.shape[1], k.shape[1], position_ids)
    output = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scaling)
    return output.flatten(2, 3), None


def _bias(queries: int, keys: int, position_ids: Tensor | None) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, LowerTriangularFromBottomRightMask

    if position_ids is None or position_ids.shape[0] > 1 or queries != keys:
        return LowerTriangularFromBottomRightMask()
    if not hasattr(position_ids, BIAS):
        setattr(position_ids, BIAS, BlockDiagonalCausalMask.from_seqlens(sequence_lengths(position_ids)))
    return getattr(position_ids, BIAS)


def _mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None if there is no padding; then the position ids determine the attention."""
    return None if attention_mask is None or attention_mask.all() else attention_mask


def register() -> None:
    """Register the implementation with Transformers. xformers is imported on first use."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, xformers_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
