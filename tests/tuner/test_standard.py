# SPDX-License-Identifier: Apache-2.0
"""Standardized generators: the positions they read, training, and saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.tuner.models import make
from vllm_parade.adapter.config import POOLERS
from vllm_parade.inspect import prompt_dependence
from vllm_parade.tuner import ParadeConfig
from vllm_parade.tuner.standard import Observed, positions_read


def batch(seed: int = 1, rows: int = 64, prompt: int = 12, answer: int = 3) -> dict[str, torch.Tensor]:
    """Prompts with answers; all prompts share their first and last tokens, as from a template."""
    ids = torch.randint(3, 101, (rows, prompt + answer), generator=torch.Generator().manual_seed(seed))
    ids[:, :3], ids[:, prompt - 1] = 7, 9
    labels = ids.masked_fill(torch.arange(prompt + answer) < prompt, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def standardized(**config: Any) -> Any:
    model = get_peft_model(make("llama"), ParadeConfig(r=8, **config))
    model.base_model.standardize([batch(1), batch(2)])
    return model


def downs(model: Any) -> list[Any]:
    return [module.down["default"] for name, module in model.named_modules() if name.endswith("parade_generator")]


def test_folding_is_standardizing() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(500, 16) * torch.linspace(2, 20, 16) + torch.linspace(-40, 60, 16)
    observed = Observed("attentional_capsule")
    for part in hidden.view(10, 50, 16).split(4):
        observed.add(part, torch.ones(part.shape[:2]).bool())
    standard, weight = observed.standard(), torch.randn(3, 8, 16)
    torch.testing.assert_close(standard.std, hidden.std(dim=0))
    wanted = hidden / hidden.std(dim=0)
    direction = torch.nn.functional.normalize(wanted.mean(dim=0), dim=0)
    wanted = wanted - (wanted @ direction)[:, None] * direction
    torch.testing.assert_close(hidden @ standard.fold(weight).mT, wanted @ weight.mT, atol=1e-3, rtol=1e-3)
    # The direction common to all hidden states is removed.
    assert (hidden @ standard.fold(weight).mT).mean(dim=1).abs().max() < 0.02 * weight.abs().sum(dim=-1).max()
    folded = standard.fold(weight)
    torch.testing.assert_close(standard.fold(standard.unfold(folded)), folded)


def test_a_dimension_that_never_differs_is_not_blown_up() -> None:
    observed = Observed("attentional_capsule")
    observed.add(torch.tensor([[[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]]]), torch.ones(1, 3).bool())
    std = observed.standard().std
    assert std[1] == pytest.approx(0.1 * std[0].item() / 2)
    with pytest.raises(ValueError, match="0 positions give no deviation"):
        Observed("last_token").standard()


def test_nor_is_a_last_token_that_all_prompts_have() -> None:
    torch.manual_seed(0)
    hidden, mask = torch.randn(50, 9, 16) * 3, torch.ones(50, 9).bool()
    hidden[:, 7:] = 1.0
    hidden[25:, 6], mask[:25, 8], mask[25:, 7:] = 1.0, False, False
    observed = Observed("last_token")
    observed.add(hidden, mask)
    torch.testing.assert_close(observed.standard().std, 0.1 * hidden[mask].std(dim=0))


def test_poolers_read_their_positions() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    assert torch.equal(positions_read(mask, "attentional_capsule"), mask)
    assert positions_read(mask, "last_token").nonzero().tolist() == [[0, 3], [1, 1]]


@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
@pytest.mark.parametrize("pooler", POOLERS)
def test_vectors_begin_to_depend_on_the_prompt(pooler: str, generator_input: str) -> None:
    settings = {"pooler": pooler, "generator_input": generator_input}
    ratios = []
    for model in (get_peft_model(make("llama"), ParadeConfig(r=8, **settings)), standardized(**settings)):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("up.default.weight"):
                parameter.data.normal_(std=0.1)
        ratios.append(prompt_dependence(vectors_of(model))["ratio"])
    plain, standard = ratios
    assert standard > max(0.3, 1.5 * plain)


def vectors_of(model: Any) -> dict[int, torch.Tensor]:
    """Vectors of a batch's prompts, by layer."""
    prompts = {name: tensor[:, :12] for name, tensor in batch(3).items() if name != "labels"}
    with torch.no_grad():
        return model(**prompts, use_cache=True).past_key_values.parade_turns.last_vectors()


def test_a_standardized_adapter_changes_no_answer_before_it_is_trained() -> None:
    asked = batch(3)["input_ids"]
    assert torch.equal(standardized().eval()(asked).logits, make("llama")(asked).logits)


def train(model: Any, steps: int = 5) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(4, rows=8)).loss.backward()
        optimizer.step()
    return model.eval()


def test_saved_it_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    model, asked = train(standardized()), batch(5, rows=4)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    with torch.no_grad():
        logits = [each(asked["input_ids"]).logits for each in (model, plain, make("llama"))]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
    assert all(down.standard is None for down in downs(plain))
    assert not any("std" in name or "common" in name for name in model.state_dict())


def test_training_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    model = train(standardized())
    model.save_pretrained(tmp_path)
    again = standardized()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    asked = batch(5, rows=4)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(asked).logits, model(asked).logits, atol=1e-4, rtol=1e-4)
    assert all(down.standard is not None for down in downs(again))


def test_only_a_new_adapter_can_be_standardized() -> None:
    with pytest.raises(ValueError, match="adapter 'default' has been trained"):
        train(standardized()).base_model.standardize([batch()])
    with pytest.raises(ValueError, match="0 positions"):
        get_peft_model(make("llama"), ParadeConfig()).base_model.standardize([])
