# SPDX-License-Identifier: Apache-2.0
"""Sequences packed into one row give the same result as alone, with PyTorch's attention or, on GPUs, xformers."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests.tuner.models import make
from vllm_parade.tuner import ParadeConfig
from vllm_parade.tuner.attention import sequence_lengths

LENGTHS = (5, 9, 2, 7)
PROMPTS = (3, 4, 1, 6)


@pytest.fixture
def sequences() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    found = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(3, 101, (1, length))
        found.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < prompt, -100)})
    return found


def packed(sequences: list[dict[str, Tensor]]) -> dict[str, Any]:
    # With a cache, Transformers would treat the row as one sequence.
    batch: dict[str, Any] = {"use_cache": False}
    batch |= {name: torch.cat([one[name] for one in sequences], dim=1) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(batch["labels"].device)
    return batch


def adapted(model_type: str, attention: str, **config: Any) -> Any:
    """A float64 model with strong adapters; Transformers keeps rotary embedding and softmax in float32."""
    model = get_peft_model(make(model_type, attn_implementation=attention), ParadeConfig(r=8, **config)).double()
    model.base_model.pooling_dtype = torch.float64
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".parade_generator." in name:
            parameter.data.normal_(float(name.endswith("bias")), 0.5)
    return model


def check(model: Any, sequences: list[dict[str, Tensor]], tolerance: float = 2e-5) -> None:
    alone = torch.cat([model(**one).logits for one in sequences], dim=1)
    torch.testing.assert_close(model(**packed(sequences)).logits, alone, atol=tolerance, rtol=tolerance)


def test_sequences_begin_where_positions_do_not_go_on() -> None:
    assert sequence_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
    assert sequence_lengths(torch.tensor([[4, 5, 6]])) == [3]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_is_as_alone(model_type: str, attention: str, sequences: list[dict[str, Tensor]]) -> None:
    check(adapted(model_type, attention), sequences)


@pytest.mark.parametrize("pooler", ["dynamic_routing", "last_token"])
def test_packed_with_other_poolers(pooler: str, sequences: list[dict[str, Tensor]]) -> None:
    check(adapted("llama", "sdpa", pooler=pooler), sequences)


def test_packed_gradients(sequences: list[dict[str, Tensor]]) -> None:
    model = adapted("llama", "sdpa").train()
    # The loss of a packed batch is the mean over all its labels.
    counts = [int((one["labels"] != -100).sum()) for one in sequences]
    losses = [model(**one).loss * count for one, count in zip(sequences, counts, strict=True)]
    (sum(losses) / sum(counts)).backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    batch = packed(sequences)
    # The first token of a sequence must not be predicted from the sequence before it.
    batch["labels"][0, [0, *torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()]] = -100
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, alone[name], atol=1e-5, rtol=1e-4)


def test_a_sequence_without_prompt_is_refused(sequences: list[dict[str, Tensor]]) -> None:
    sequences[2]["labels"] = sequences[2]["input_ids"].clone()
    with pytest.raises(ValueError, match="no instruction token"):
        adapted("llama", "sdpa")(**packed(sequences))
    sequences[2]["labels"][0, 0] = -100
    with pytest.raises(ValueError, match="packed batch, which needs use_cache=False"):
        adapted("llama", "sdpa")(**{**packed(sequences), "use_cache": True})


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, p: float, scale: float) -> Tensor:
    """xformers' `memory_efficient_attention` in plain PyTorch; q, k, v are [batch, tokens, groups, heads, size]."""
    assert p == 0
    scores = torch.einsum("bqghd,bkghd->bghqk", q, k) * scale
    bias = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
    return torch.einsum("bghqk,bkghd->bqghd", (scores + bias).softmax(-1), v)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_xformers_gets_its_layout_and_mask(
    model_type: str, sequences: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = pytest.importorskip("xformers.ops", reason="needs xformers")
    monkeypatch.setattr(ops, "memory_efficient_attention", plain_attention)
    model = adapted(model_type, "xformers")
    check(model, sequences)
    expected = adapted(model_type, "sdpa")(**packed(sequences)).logits
    torch.testing.assert_close(model(**packed(sequences)).logits, expected, atol=2e-5, rtol=2e-5)
    ids = sequences[1]["input_ids"]
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = adapted(model_type, "sdpa").generate(input_ids=ids, **greedy)
    assert torch.equal(model.generate(input_ids=ids, **greedy), wanted)
    padded = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    with pytest.raises(ValueError, match="takes no padding"):
        model(input_ids=ids.expand(2, -1), attention_mask=padded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers has no attention kernel for CPUs")
def test_xformers_kernels(sequences: list[dict[str, Tensor]]) -> None:
    pytest.importorskip("xformers.ops", reason="needs xformers")
    model = adapted("llama", "xformers").to("cuda", torch.bfloat16)
    on_gpu = [{name: tensor.cuda() for name, tensor in one.items()} for one in sequences]
    check(model, on_gpu, tolerance=5e-2)
    model(**packed(on_gpu)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
