# SPDX-License-Identifier: Apache-2.0
"""The study trains and measures groups of runs."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.study.data import Batches, template_size
from benchmarks.study.group import Group, Hyperparameters
from benchmarks.study.study import Study
from vllm_parade.train.data import encode_prompt

RUNS = (Hyperparameters(3e-2, 0), Hyperparameters(3e-2, 1))


@pytest.fixture(scope="module")
def study(smollm: str, sst2: Path) -> Study:
    """A study of a tiny random model with SmolLM2's vocabulary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=49152, initializer_range=0.3, **sizes)).eval()
    return Study(base, AutoTokenizer.from_pretrained(smollm), {"sst2": sst2}, eval_every=5)


@pytest.mark.parametrize(("own_words", "standardized"), [(False, False), (True, False), (False, True)])
def test_a_group_is_trained_and_measured(study: Study, own_words: bool, standardized: bool) -> None:
    kind = {"own_words": own_words, "standardized": standardized}
    records = list(study.records(Group("g", "parade", ("sst2",), RUNS, {"r": 8}, steps=10, rows=4, **kind)))
    assert [record["seed"] for record in records] == [0, 1]
    first = records[0]
    assert first["best_step"] in (5, 10)
    assert first["steps_done"] == 10
    assert first["dev_loss"] == first["sst2_dev_loss"] < 12
    assert 0 <= first["sst2"] <= 100
    assert 0 <= first["sst2_swapped"] <= 100
    assert abs(first["loss_added_by_strangers_vectors"]) < 12
    # With one task, the dependence over all prompts is that of the task.
    assert first["dependence"]["ratio"] == first["sst2_dependence"]["ratio"] > 0
    assert first["parameters"] == 2 * (32 * 8 + 8 * 112 + 8 * 8 + 4 * 8 + 112)
    # The base model has no hooks left.
    assert not any(module._forward_hooks for module in study.base.modules())


def test_a_group_whose_time_is_over_is_measured(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "deadline", 0.0)
    for record in study.records(Group("g", "ia3", ("sst2",), RUNS, steps=10, rows=4)):
        assert (record["steps"], record["steps_done"], record["best_step"]) == (10, 1, 1)
        assert 0 <= record["sst2"] <= 100


def test_training_lowers_the_dev_loss(study: Study) -> None:
    losses = {}
    for steps in (5, 40):
        group = Group("g", "ia3", ("sst2",), RUNS, {"target_modules": ["q_proj", "up_proj"]}, steps=steps, rows=8)
        losses[steps] = [record["dev_loss"] for record in study.records(group)]
    assert all(late < early for early, late in zip(losses[5], losses[40], strict=True))


def test_own_words_leave_the_template_out(study: Study) -> None:
    tokenizer = study.tokenizer
    before, after = template_size(tokenizer)
    prompt = encode_prompt(tokenizer, "a moving film")
    words = tokenizer.decode(prompt[before : len(prompt) - after])
    assert words == "a moving film"
    group = Group("g", "parade", ("sst2",), RUNS, own_words=True)
    batches = Batches(study.data, group, study.template, torch.device("cpu"))
    # Padded on the left, as for answers, and on the right, as in training.
    for mask in (torch.tensor([[0] * 3 + [1] * len(prompt)]), torch.tensor([[1] * len(prompt) + [0] * 5])):
        found = batches.instruction(mask.bool())[0].nonzero().flatten().tolist()
        start = int(mask[0].argmax())
        assert found == list(range(start + before, start + len(prompt) - after))
