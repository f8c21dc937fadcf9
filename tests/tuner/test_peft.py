# SPDX-License-Identifier: Apache-2.0
"""The generic checks of PEFT's own tests that apply to PARADE.

Checks of merging, weighted combination and negative weights do not apply, because vectors differ per prompt. vLLM
serves mixed batches (`adapter_names=`); PEFT itself supports them only for LoRA.
"""

import copy
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model, get_peft_model_state_dict

import vllm_parade
from tests.documents import texts
from tests.tuner.models import make
from vllm_parade.adapter import AdapterConfig, AdapterError, load_adapter
from vllm_parade.tuner import ParadeConfig, ParadeModel

IDS = torch.arange(3, 24).view(3, 7)
LABELS = torch.where(torch.arange(7) < 4, -100, IDS)


@pytest.fixture
def base() -> Any:
    return make("llama")


def strengthen(model: Any, seed: int, adapter: str = "default") -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)


@pytest.fixture
def model(base: Any) -> Any:
    model = get_peft_model(base, ParadeConfig(r=8)).eval()
    strengthen(model, 0)
    return model


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def test_the_package_gives_the_config_away() -> None:
    assert vllm_parade.ParadeConfig is ParadeConfig
    with pytest.raises(AttributeError, match="no attribute 'ParadeTuner'"):
        _ = vllm_parade.ParadeTuner


def test_the_lines_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = texts("docs/training.md", "tests/tuner/test_peft.py::test_the_lines_of_the_page", "python")
    names: dict[str, Any] = {"model": make("llama"), "base": make("llama"), "ids": IDS, "labels": LABELS}
    exec(text, names)
    assert isinstance(names["model"], PeftModel)
    assert load_adapter("adapters/mine").config.r == 12


def test_config_and_server_agree_on_fields_and_defaults() -> None:
    mine, served = ParadeConfig(), AdapterConfig()
    for field in fields(AdapterConfig):
        if field.name not in ("task_type", "inference_mode"):
            value = getattr(mine, field.name)
            assert (tuple(value) if isinstance(value, list) else value) == getattr(served, field.name)


def test_config_values_are_checked_as_by_the_server() -> None:
    with pytest.raises(AdapterError, match="r is 10, not a multiple of num_capsules, 4"):
        ParadeConfig(r=10)
    with pytest.raises(AdapterError, match="pooler is 'mean'"):
        ParadeConfig(pooler="mean")
    assert ParadeConfig(sites=["up", "q"]).sites == ["q", "up"]


def test_config_round_trips(tmp_path: Path) -> None:
    config = ParadeConfig(
        r=8, num_capsules=2, sites=["v"], layers_to_transform=[1], base_model_name_or_path="somebody/base"
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PARADE"


def test_only_generators_are_trainable(model: Any) -> None:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert isinstance(model, PeftModelForCausalLM)
    assert isinstance(model.base_model, ParadeModel)
    assert trainable == {name for name, _ in model.named_parameters() if ".parade_generator." in name}
    # Per layer: d r + r d_out + r r + K r + d_out (bias), with d = 64 and d_out = 64 + 32 + 96; three layers.
    assert model.get_nb_trainable_parameters()[0] == 3 * (64 * 8 + 8 * 192 + 8 * 8 + 4 * 8 + 192)


def test_saved_folder_is_the_servers(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.config.r == 8
    assert sorted(adapter.generators) == [0, 1, 2]
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.parade_generator.pooler.query" in names
    assert len(names) == 3 * 5


@pytest.mark.parametrize("damage", ["missing", "superfluous", "misshapen", "nan"])
def test_damaged_weights_are_refused_when_loaded(model: Any, tmp_path: Path, damage: str) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "base_model.model.model.layers.1.parade_generator.up.bias"
    if damage == "missing":
        del tensors[name]
    elif damage == "superfluous":
        tensors[name.replace("layers.1", "layers.9")] = tensors[name].clone()
    elif damage == "misshapen":
        tensors[name] = tensors[name][1:].clone()
    else:
        tensors[name][0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    message = {"missing": "is missing", "nan": "holds NaN", "misshapen": "has shape"}.get(damage, "is superfluous")
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_loaded_for_inference_or_to_go_on_training(model: Any, tmp_path: Path) -> None:
    expected = logits(model)
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(logits(frozen.eval()), expected)
    trainable = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_several_adapters(model: Any, tmp_path: Path) -> None:
    """Each adapter gives the same answers as alone; adapters may differ in every setting."""
    first = logits(model)
    model.add_adapter("second", ParadeConfig(r=6, num_capsules=2, sites=["k", "gate"], layers_to_transform=[1]))
    strengthen(model, 1, "second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".second" in n
    }
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(make("llama"), tmp_path / "second").eval()
    assert torch.equal(logits(alone), second)
    alone.load_adapter(tmp_path, adapter_name="first")
    alone.set_adapter("first")
    assert torch.equal(logits(alone), first)
    with pytest.raises(ValueError, match="adapters default, second cannot be active together"):
        model.base_model.set_adapter(["default", "second"])


def test_a_cache_belongs_to_its_adapter(model: Any) -> None:
    model.add_adapter("second", ParadeConfig(r=8))
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    model.set_adapter("second")
    with pytest.raises(ValueError, match="filled under adapter 'default', and 'second' is active"):
        model(input_ids=IDS[:, -1:], past_key_values=cache)


def test_deleting_adapters(model: Any) -> None:
    first = logits(model)
    model.add_adapter("second", ParadeConfig(r=8))
    strengthen(model, 1, "second")
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), first)
    assert not any(".second" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.base_model.delete_adapter("second")


def test_disabling_gives_the_base_models_answer(base: Any) -> None:
    plain = logits(base)
    model = get_peft_model(base, ParadeConfig(r=8)).eval()
    strengthen(model, 0)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(tokens, make("llama").generate(input_ids=IDS, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_reaches_every_parameter(model_type: str, attention: str) -> None:
    model = get_peft_model(make(model_type, attn_implementation=attention), ParadeConfig(r=8))
    strengthen(model, 0)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".parade_generator." in name)
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(model_type: str, use_reentrant: bool) -> None:
    model = get_peft_model(make(model_type), ParadeConfig(r=8)).train()
    strengthen(model, 0)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        # Two forward passes before one backward: each layer must be recomputed with the instruction of its own pass.
        loss = model(input_ids=IDS, labels=LABELS).loss + model(input_ids=IDS.flip(0), labels=LABELS).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_responses_are_not_read(model: Any) -> None:
    """With labels, generators read only tokens before the first label, so a response changes no earlier logits."""
    other = torch.where(LABELS == -100, IDS, IDS + 40)
    answers = [model(input_ids=ids, labels=LABELS).logits[:, :4] for ids in (IDS, other)]
    assert torch.equal(*answers)
    assert not torch.equal(*(model(input_ids=ids).logits[:, :4] for ids in (IDS, other)))


def test_a_bfloat16_base_trains_float32_parameters(base: Any) -> None:
    model = get_peft_model(base.to(torch.bfloat16), ParadeConfig(r=8))
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model.generate(input_ids=IDS, max_new_tokens=3).shape == (3, 10)


def test_embeddings_as_input(model: Any) -> None:
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeddings).logits, logits(model))


def test_copies_are_independent(model: Any) -> None:
    expected = logits(model)
    twin = copy.deepcopy(model)
    strengthen(twin, 5)
    assert not torch.allclose(logits(twin), expected, atol=1e-2)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_state_dict_has_the_servers_names(model: Any) -> None:
    names = get_peft_model_state_dict(model)
    assert {name.split(".parade_generator.")[1] for name in names} == {
        *("down.weight", "pooler.query", "pooler.weight", "up.weight", "up.bias")
    }


def test_a_seed_makes_initial_values_repeatable() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        base = make("llama")
        torch.manual_seed(seed)
        states.append(get_peft_model_state_dict(get_peft_model(base, ParadeConfig())))
    name = "base_model.model.model.layers.1.parade_generator.down.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
