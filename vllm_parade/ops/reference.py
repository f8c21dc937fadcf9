# SPDX-License-Identifier: Apache-2.0
"""PARADE in plain PyTorch: the single definition of the mathematics, for training, tests, kernels and benchmarks.

Equation numbers are those of the paper (PARADE: Parameter-Efficient Fine-tuning with Prompt Aware Representation
ADjustmEnt). Pooling runs in `pooling_dtype` (by default float32). The two projections run in the model's dtype,
so a generator costs as much as a small linear layer.

Shapes: `batch` prompts padded to `tokens` positions, hidden size `d`, bottleneck `r`, `k` capsules, `d_out` vector
entries.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

POOLERS = ("attentional_capsule", "dynamic_routing", "last_token")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
ROUTING_PASSES = 2


def squash(capsules: Tensor) -> Tensor:
    """Shrink capsules to a length below one, without changing their direction.

    Semantics: |s|^2 / (1 + |s|^2) * s / |s|, and 0 where s = 0  (8)

    Args:
        capsules: [..., r / k]
    """
    length = torch.linalg.vector_norm(capsules, dim=-1, keepdim=True)
    return capsules * (length / (1 + length * length))


def route(messages: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Pool the tokens' messages into capsules in two routing passes.

    Semantics: c = squash(softmax(m) @ M); m = m + M @ c; c = squash(softmax(m) @ M)  (8), (10)

    Args:
        messages: [batch, k, tokens, r / k], from each token to each capsule
        logits: [batch, k, tokens], initial attention
        mask: [batch, tokens] bool, True at the instruction's tokens

    Returns:
        [batch, k, r / k]
    """
    outside = ~mask[:, None, :]
    for routing_pass in range(ROUTING_PASSES):
        attention = logits.masked_fill(outside, float("-inf")).softmax(dim=-1)
        capsules = squash(torch.einsum("bkt,bktc->bkc", attention, messages))
        if routing_pass + 1 < ROUTING_PASSES:
            logits = logits + torch.einsum("bktc,bkc->bkt", messages, capsules)
    return capsules


def pool(projected: Tensor, mask: Tensor, *, pooler: str, query: Tensor | None, weight: Tensor | None) -> Tensor:
    """Pool the projected instruction H' into one vector z.

    Semantics: z = concat(route(H' @ W_k, H' @ v_k, mask))  (7) to (10), or H'[last instruction token]

    Args:
        projected: [batch, tokens, r]
        mask: [batch, tokens] bool, at least one True per row
        pooler: one of `POOLERS`
        query: [k, r], the v_k (attentional_capsule only)
        weight: [k, r, r / k], the W_k (not for last_token)

    Returns:
        [batch, r]
    """
    if pooler == "last_token":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=1)
        return projected[torch.arange(len(projected), device=mask.device), last]
    assert weight is not None
    messages = torch.einsum("btr,krc->bktc", projected, weight)
    if pooler == "attentional_capsule":
        assert query is not None
        logits = torch.einsum("btr,kr->bkt", projected, query)
    else:
        logits = messages.new_zeros(messages.shape[:3])
    return route(messages, logits, mask).flatten(1)


def generate(
    hidden: Tensor,
    mask: Tensor,
    *,
    down: Tensor,
    query: Tensor | None,
    weight: Tensor | None,
    up: Tensor,
    bias: Tensor,
    pooler: str,
    activation: str,
    pooling_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Generate the vectors of a batch of instructions.

    Semantics: l = g(pool(h @ down.T)) @ up.T + bias  (6)

    Args:
        hidden: [batch, tokens, d], hidden states at the layer's input
        mask: [batch, tokens] bool, True at the instruction's tokens
        down: [r, d]
        query: [k, r] or None
        weight: [k, r, r / k] or None
        up: [d_out, r]
        bias: [d_out]
        pooler: one of `POOLERS`
        activation: one of `ACTIVATIONS`
        pooling_dtype: dtype of pooling and activation; float64 shows the effect of rounding alone

    Returns:
        [batch, d_out] in the dtype of `hidden`
    """
    # Positions outside the instruction may hold any value, including NaN. An attention weight of zero would not remove
    # a NaN.
    projected = F.linear(hidden, down).to(pooling_dtype).masked_fill(~mask[..., None], 0)
    cast = {"query": query, "weight": weight}
    pooled = pool(
        projected,
        mask,
        pooler=pooler,
        **{name: None if tensor is None else tensor.to(pooling_dtype) for name, tensor in cast.items()},
    )
    activated = ACTIVATIONS[activation](pooled)
    return F.linear(activated.to(hidden.dtype), up, bias)
