# SPDX-License-Identifier: Apache-2.0
"""Runs trained side by side match each run trained alone with PEFT and PyTorch's optimiser."""

from typing import Any

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.study.batch import Batch, Pair, collate
from benchmarks.study.group import Hyperparameters
from benchmarks.study.stack import Stack, fuse_norms
from benchmarks.study.steps import Steps
from tests.tuner.models import make

RUNS = [Hyperparameters(1e-2, seed=0), Hyperparameters(3e-3, seed=1), Hyperparameters(1e-3, seed=2, bias_lr=0.1)]
ROWS, TOKENS = 2, 9
METHODS: dict[str, dict[str, Any]] = {"parade": {"r": 8}, "lora": {}, "ia3": {}}
POOLERS = ["attentional_capsule", "dynamic_routing", "last_token"]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 101, (len(RUNS) * ROWS, TOKENS))
    labels = ids.masked_fill(torch.arange(TOKENS) < 5, -100)
    labels[0, 7:] = -100
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def collated(batch: dict[str, torch.Tensor], multiple: int = 1) -> Batch:
    rows = zip(batch["input_ids"], batch["attention_mask"].sum(dim=1), strict=True)
    return collate([Pair(ids[:length], 5) for ids, length in rows], len(RUNS), multiple)


def stacked(method: str, **settings: Any) -> Stack:
    stack = Stack(make("llama"), method, {**METHODS[method], **settings}, RUNS)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in stack.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return stack


def alone(stack: Stack, run: int) -> Any:
    model = get_peft_model(make("llama"), stack.method.config)
    found = set_peft_model_state_dict(model, stack.export(run))
    assert not found.unexpected_keys
    return model


def rows_of(batch: dict[str, torch.Tensor], run: int) -> dict[str, torch.Tensor]:
    return {name: tensor[run * ROWS : (run + 1) * ROWS] for name, tensor in batch.items()}


CASES = [*((method, {}) for method in METHODS), *(("parade", {"pooler": pooler}) for pooler in POOLERS[1:])]
CASES.append(("parade", {"sites": ["k", "gate"], "generator_input": "attention_input", "layers_to_transform": [1]}))


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_losses_are_those_of_each_run_alone(
    method: str, settings: dict[str, Any], batch: dict[str, torch.Tensor]
) -> None:
    stack = stacked(method, **settings)
    losses = stack.losses(collated(batch))
    assert len({round(loss, 3) for loss in losses.tolist()}) == len(RUNS)
    for run in range(len(RUNS)):
        loss = alone(stack, run)(**rows_of(batch, run)).loss
        torch.testing.assert_close(losses[run], loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_adamw(method: str, batch: dict[str, torch.Tensor]) -> None:
    stack = stacked(method)
    models = [alone(stack, run) for run in range(len(RUNS))]
    optimizers = []
    for model, run in zip(models, RUNS, strict=True):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        bias = [p for name, p in trained.items() if name.endswith("bias")]
        others = [p for name, p in trained.items() if not name.endswith("bias")]
        groups = [{"params": others, "lr": run.lr}, {"params": bias, "lr": run.lr * run.bias_lr}]
        optimizers.append(torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0))
    take_step = Steps(stack, [collated(batch)])
    for _ in range(3):
        take_step(collated(batch), 1.0)
        for run, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            model(**rows_of(batch, run)).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
    for run, model in enumerate(models):
        moved = stack.losses(collated(batch))[run]
        torch.testing.assert_close(moved, model(**rows_of(batch, run)).loss, atol=1e-3, rtol=1e-3)


def test_answers_keep_their_prompts_vectors(batch: dict[str, torch.Tensor]) -> None:
    stack = stacked("parade")
    prompts = batch["input_ids"][:, :5]
    stack.read(torch.ones_like(prompts, dtype=torch.bool))
    answers = stack.base.generate(input_ids=prompts, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for run in range(len(RUNS)):
        model = alone(stack, run).eval()
        wanted = model.generate(
            input_ids=prompts[run * ROWS : (run + 1) * ROWS], max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert torch.equal(answers[run * ROWS : (run + 1) * ROWS], wanted)


def test_another_prompts_vectors_change_the_loss(batch: dict[str, torch.Tensor]) -> None:
    stack = stacked("parade")
    own, others = (stack.losses(collated(batch), shift) for shift in (0, 1))
    assert (own - others).abs().min() > 1e-3
    back = stack.losses(collated(batch), ROWS)
    torch.testing.assert_close(back, own)


def test_removing_gives_the_base_model_back(batch: dict[str, torch.Tensor]) -> None:
    stack = stacked("lora")
    stack.read(collated(batch).instruction)
    plain = make("llama")(batch["input_ids"]).logits
    assert not torch.allclose(stack.base(batch["input_ids"]).logits, plain, atol=1e-3)
    stack.remove()
    assert torch.equal(stack.base(batch["input_ids"]).logits, plain)


def test_padding_changes_no_loss(batch: dict[str, torch.Tensor]) -> None:
    stack = stacked("parade")
    padded = collated(batch, multiple=16).widen(20)
    assert padded.ids.shape == (len(RUNS) * ROWS, 16)
    assert padded.places.shape == padded.targets.shape == (len(RUNS), 20)
    torch.testing.assert_close(stack.losses(padded), stack.losses(collated(batch)))


def test_fused_norms_are_the_model_s(batch: dict[str, torch.Tensor]) -> None:
    base = make("llama")
    plain = base(batch["input_ids"]).logits
    fuse_norms(base)
    torch.testing.assert_close(base(batch["input_ids"]).logits, plain)


def test_resetting_the_optimizer_forgets_its_moments(batch: dict[str, torch.Tensor]) -> None:
    stack = stacked("parade")
    before, moved = stack.flat.detach().clone(), []
    for _ in range(2):
        Steps(stack, [collated(batch)])(collated(batch), 1.0)
        moved.append(stack.flat.detach().clone())
        with torch.no_grad():
            stack.flat.copy_(before)
        stack.reset_optimizer()
    torch.testing.assert_close(*moved)
    # The warm-up before a graph is captured.
    Steps(stack, [collated(batch)])(collated(batch), 0.0)
    assert torch.equal(stack.flat, before)


class NoValues(TorchDispatchMode):
    """Refuses operators that wait for a tensor's values, as the capture of a CUDA graph does."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_a_step_can_be_captured(method: str, settings: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    stack, pairs, share = stacked(method, **settings), collated(batch), torch.tensor(1.0)
    with NoValues():
        stack.step(stack.losses(pairs), share)
