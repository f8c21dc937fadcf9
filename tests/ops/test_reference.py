# SPDX-License-Identifier: Apache-2.0
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_parade.ops.reference import ACTIVATIONS, POOLERS, ROUTING_PASSES, generate, pool, route, squash

SCALAR_ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}
in_float64 = partial(generate, pooling_dtype=torch.float64)


def make_inputs(lengths=(5, 1, 9), d=6, r=6, k=3, d_out=10, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    lengths = torch.tensor(lengths)
    tokens = int(lengths.max())
    weights = {
        "down": normal(r, d),
        "query": normal(k, r),
        "weight": normal(k, r, r // k),
        "up": normal(d_out, r),
        "bias": normal(d_out),
    }
    return normal(len(lengths), tokens, d), torch.arange(tokens) < lengths[:, None], weights


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def by_hand(prompt, weights, pooler, activation):
    """The vector of one prompt [T, d] in Python floats, step by step as in the paper."""
    down, up, bias = (weights[name].tolist() for name in ("down", "up", "bias"))
    projected = [[dot(row, token) for row in down] for token in prompt.tolist()]
    if pooler == "last_token":
        pooled = projected[-1]
    else:
        pooled = []
        for k, matrix in enumerate(weights["weight"].tolist()):
            query = weights["query"][k].tolist() if pooler == "attentional_capsule" else None
            pooled += capsule_by_hand(projected, matrix, query)
    activated = [SCALAR_ACTIVATIONS[activation](value) for value in pooled]
    return torch.tensor([dot(row, activated) + b for row, b in zip(up, bias, strict=True)], dtype=torch.float64)


def capsule_by_hand(projected, matrix, query):
    messages = [[dot(token, column) for column in zip(*matrix, strict=True)] for token in projected]
    logits = [0.0 if query is None else dot(token, query) for token in projected]
    for update in (True, False):
        exponentials = [math.exp(logit) for logit in logits]
        attention = [value / sum(exponentials) for value in exponentials]
        summed = [dot(attention, column) for column in zip(*messages, strict=True)]
        squared = dot(summed, summed)
        capsule = [squared / (1 + squared) * value / math.sqrt(squared) for value in summed]
        if update:
            logits = [logit + dot(message, capsule) for logit, message in zip(logits, messages, strict=True)]
    return capsule


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_paper_written_in_loops(pooler, activation):
    hidden, mask, weights = make_inputs()
    vectors = in_float64(hidden, mask, **weights, pooler=pooler, activation=activation)
    for prompt, inside, vector in zip(hidden, mask, vectors, strict=True):
        expected = by_hand(prompt[inside], weights, pooler, activation)
        torch.testing.assert_close(vector, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    k=st.integers(1, 4),
    capsule_size=st.integers(1, 3),
    pooler=st.sampled_from(POOLERS),
    seed=st.integers(0, 99),
)
def test_equals_the_loops_at_any_size(lengths, k, capsule_size, pooler, seed):
    hidden, mask, weights = make_inputs(tuple(lengths), r=k * capsule_size, k=k, seed=seed)
    vectors = in_float64(hidden, mask, **weights, pooler=pooler, activation="gelu")
    for prompt, inside, vector in zip(hidden, mask, vectors, strict=True):
        torch.testing.assert_close(vector, by_hand(prompt[inside], weights, pooler, "gelu"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooler", POOLERS)
def test_ragged_batch_equals_one_by_one(pooler):
    hidden, mask, weights = make_inputs((7, 3, 1, 12))
    vectors = in_float64(hidden, mask, **weights, pooler=pooler, activation="gelu")
    for prompt, inside, vector in zip(hidden, mask, vectors, strict=True):
        alone = prompt[inside][None]
        everything = torch.ones(alone.shape[:2], dtype=torch.bool)
        expected = in_float64(alone, everything, **weights, pooler=pooler, activation="gelu")[0]
        torch.testing.assert_close(vector, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooler", POOLERS)
def test_instruction_may_start_late_and_pause(pooler):
    hidden, _, weights = make_inputs((9,))
    mask = torch.tensor([[False, True, True, False, False, True, True, False, False]])
    vector = in_float64(hidden, mask, **weights, pooler=pooler, activation="gelu")[0]
    expected = by_hand(hidden[0, mask[0]], weights, pooler, "gelu")
    torch.testing.assert_close(vector, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_what_stands_outside_the_instruction_has_no_effect(pooler, garbage):
    hidden, mask, weights = make_inputs()
    clean = in_float64(hidden, mask, **weights, pooler=pooler, activation="gelu")
    poisoned = hidden.masked_fill(~mask[..., None], garbage)
    assert torch.equal(in_float64(poisoned, mask, **weights, pooler=pooler, activation="gelu"), clean)


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing"])
def test_order_of_tokens_does_not_matter_to_capsules(pooler):
    hidden, mask, weights = make_inputs((8,))
    vectors = in_float64(hidden, mask, **weights, pooler=pooler, activation="gelu")
    turned = in_float64(hidden.flip(1), mask, **weights, pooler=pooler, activation="gelu")
    torch.testing.assert_close(turned, vectors, rtol=1e-12, atol=1e-12)


@given(st.floats(0, 1e6), st.integers(1, 6))
def test_squash_keeps_direction_and_stays_below_one(length, size):
    direction = torch.nn.functional.normalize(torch.arange(1.0, size + 1, dtype=torch.float64), dim=0)
    torch.testing.assert_close(squash(direction * length), direction * (length**2 / (1 + length**2)))


def test_squash_of_zero_is_zero_with_finite_gradient():
    capsules = torch.zeros(2, 3, requires_grad=True)
    squashed = squash(capsules)
    squashed.sum().backward()
    assert torch.equal(squashed, torch.zeros(2, 3))
    assert torch.equal(capsules.grad, torch.zeros(2, 3))


def test_route_makes_two_passes():
    assert ROUTING_PASSES == 2
    messages = torch.tensor([[[[1.0], [3.0]]]])
    logits, mask = torch.zeros(1, 1, 2), torch.ones(1, 2, dtype=torch.bool)
    first = 4 / 5  # squash(2)
    weights = torch.tensor([first, 3 * first]).softmax(0)
    torch.testing.assert_close(route(messages, logits, mask), squash((weights @ messages[0, 0])[None, None]))


@pytest.mark.parametrize("pooler", POOLERS)
def test_zero_hidden_states_give_the_bias_and_finite_gradients(pooler):
    _, mask, weights = make_inputs(dtype=torch.float32)
    tensors = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    hidden = torch.zeros(*mask.shape, 6, requires_grad=True)
    vectors = generate(hidden, mask, **tensors, pooler=pooler, activation="gelu")
    assert torch.equal(vectors, weights["bias"].expand_as(vectors))
    vectors.square().sum().backward()
    gradients = [tensor.grad for tensor in (hidden, *tensors.values()) if tensor.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert tensors["down"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooler", POOLERS)
def test_fresh_adapter_is_exactly_one(pooler, dtype):
    hidden, mask, weights = make_inputs((300, 1), dtype=dtype)
    fresh = {**weights, "up": torch.zeros_like(weights["up"]), "bias": torch.ones_like(weights["bias"])}
    vectors = generate(hidden * 100, mask, **fresh, pooler=pooler, activation="gelu")
    assert vectors.dtype == dtype
    assert (vectors == 1).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float32, 1e-4)])
@pytest.mark.parametrize("pooler", POOLERS)
def test_low_precision_stays_near_float64(pooler, dtype, tolerance):
    hidden, mask, weights = make_inputs(dtype=dtype)
    vectors = generate(hidden, mask, **weights, pooler=pooler, activation="gelu")
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = in_float64(hidden.double(), mask, **exact, pooler=pooler, activation="gelu")
    assert vectors.dtype == dtype
    assert (vectors.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing"])
def test_only_the_projections_are_bfloat16_in_a_bfloat16_model(pooler):
    hidden, mask, weights = make_inputs(dtype=torch.bfloat16)
    vectors = generate(hidden, mask, **weights, pooler=pooler, activation="gelu")
    projected = F.linear(hidden, weights["down"]).float()
    pooled = pool(projected, mask, pooler=pooler, query=weights["query"].float(), weight=weights["weight"].float())
    expected = F.linear(F.gelu(pooled).bfloat16(), weights["up"], weights["bias"])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=0)
    coarse = generate(hidden, mask, **weights, pooler=pooler, activation="gelu", pooling_dtype=torch.bfloat16)
    assert not torch.equal(coarse, vectors)


@pytest.mark.parametrize("pooler", POOLERS)
def test_gradcheck(pooler):
    hidden, mask, weights = make_inputs((3, 2), d=4, r=4, k=2, d_out=3)
    used = [name for name in weights if pooler == "attentional_capsule" or name != "query"]
    used = [name for name in used if pooler != "last_token" or name != "weight"]

    def vectors(hidden, *tensors):
        given = {"query": None, "weight": None, **dict(zip(used, tensors, strict=True))}
        return in_float64(hidden, mask, **given, pooler=pooler, activation="gelu")

    inputs = [hidden.requires_grad_(), *(weights[name].requires_grad_() for name in used)]
    assert torch.autograd.gradcheck(vectors, inputs)


def test_loads_without_vllm_and_triton():
    program = "import sys, vllm_parade.ops.reference; print([m for m in ('vllm', 'triton') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
