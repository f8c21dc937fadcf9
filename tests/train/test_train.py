# SPDX-License-Identifier: Apache-2.0
"""The training command, from examples to a served adapter."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.engines import engine, greedy, prompts
from tests.tuner.models import make
from vllm_parade import ParadeRequest
from vllm_parade.adapter import load_adapter
from vllm_parade.train.__main__ import parse
from vllm_parade.train.arguments import AdapterArguments, PromptTrainingArguments
from vllm_parade.train.trainer import PromptTrainer, _check_fsdp, adapter_state, train
from vllm_parade.tuner import ParadeConfig

STEPS = 30
FLAGS = ["--per_device_train_batch_size", "4", "--learning_rate", "5e-3", "--dtype", "float32", "--eval_on_start"]
FLAGS += ["--dataloader_pin_memory", "false"]


def run(model: str, data: Path, output: Path, *flags: str, processes: int = 0) -> None:
    """Train in this process (`processes=0`), or run the command with `processes` processes."""
    given = ["--model", model, "--task", "sst2", "--data", str(data), "--output_dir", str(output), *FLAGS, *flags]
    if not processes:
        train(*parse(given))
        return
    several = ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *several, "vllm_parade.train", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def history(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def adapter(small: str, sst2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(small, sst2, tmp_path_factory.mktemp("trained") / "adapter")


def trained(model: str, data: Path, output: Path) -> Path:
    every = ["--eval_steps", "10", "--save_steps", "10"]
    run(model, data, output, "--max_steps", str(STEPS), *every, "--base_name", "base", processes=1)
    return output


@pytest.mark.slow
def test_thirty_steps_lower_the_dev_loss_of_a_random_model(adapter: Path) -> None:
    losses = [entry["eval_loss"] for entry in history(adapter) if "eval_loss" in entry]
    assert len(losses) >= 4
    # The bound is small: the model has SmolLM2's whole vocabulary but only two layers.
    assert min(losses[1:]) < losses[0] - 1


@pytest.mark.nightly
def test_thirty_steps_lower_the_dev_loss(smollm: str, sst2: Path, tmp_path: Path) -> None:
    entries = history(trained(smollm, sst2, tmp_path / "adapter"))
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert min(losses[1:]) < losses[0] / 4
    scores = [entry["eval_sst2"] for entry in entries if "eval_sst2" in entry]
    assert scores[-1] >= scores[0]


@pytest.mark.parametrize(("model", "share"), [("small", 0.97), pytest.param("smollm", 0.5, marks=pytest.mark.nightly)])
@pytest.mark.slow
def test_standardized_training_lowers_it_too(
    request: pytest.FixtureRequest, model: str, share: float, sst2: Path, tmp_path: Path
) -> None:
    flags = ["--standardize", "true", "--bias_lr_ratio", "10", "--learning_rate", "1e-3", "--metric_rows", "0"]
    steps = ["--max_steps", "6", "--eval_steps", "6", "--save_steps", "6"]
    run(request.getfixturevalue(model), sst2, tmp_path / "adapter", *flags, *steps)
    losses = [entry["eval_loss"] for entry in history(tmp_path / "adapter") if "eval_loss" in entry]
    assert losses[-1] < losses[0] * share
    assert "| standardize | True |\n| bias_lr_ratio | 10 |" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_the_bias_has_its_own_learning_rate(ratio: float, tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), ParadeConfig(r=8))
    options = AdapterArguments(model="m", train_file="f", bias_lr_ratio=ratio)
    arguments = PromptTrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, use_cpu=True)
    arguments.batch_for(1)
    trainer = PromptTrainer(model=model, args=arguments, eval_dataset=[{}], options=options, tasks={})
    groups = trainer.create_optimizer().param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(trained)
    for name, parameter in trained.items():
        assert rates[parameter] == pytest.approx(1e-3 * (ratio if name.endswith(".bias") else 1))


@pytest.mark.slow
def test_card_and_config(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert "base_model: base\n" in card
    assert "# A PARADE adapter for sst2\n" in card
    assert "| lr_scheduler_type | linear |" in card
    assert "- weights: random" in card
    assert "| eval_sst2 |" in card
    assert "- data set: made up for a test" in card
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


@pytest.mark.slow
@pytest.mark.engine
def test_served_it_answers_as_in_peft(small: str, adapter: Path) -> None:
    asked = prompts([20, 33, 64], seed=31)
    with engine(small, enable_parade=True) as llm:
        served = llm.generate(asked, greedy(), parade_request=ParadeRequest("mine", str(adapter)), use_tqdm=False)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), adapter)
    for question, output in zip(asked, served, strict=True):
        answer = list(output.outputs[0].token_ids)
        ids = torch.tensor([question["prompt_token_ids"]])
        tokens = {"max_new_tokens": len(answer), "min_new_tokens": len(answer)}
        assert model.generate(input_ids=ids, do_sample=False, **tokens)[0, ids.shape[1] :].tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_same_command_trains_what_is_compared(method: str, small: str, sst2: Path, tmp_path: Path) -> None:
    flags = ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--metric_rows", "0"]
    # Packed and padded batches train alike, so each is run with only one method.
    run(small, sst2, tmp_path / "adapter", "--method", method, *flags, *(["--packed"] if method == "ia3" else []))
    assert safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(small: str, sst2: Path, tmp_path: Path) -> None:
    flags = ["--max_steps", "3", "--eval_steps", "3", "--save_steps", "3", "--metric_rows", "0", "--use_cpu", "true"]
    flags += ["--train_sampling_strategy", "sequential", "--dev_rows", "4"]
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        size = str(4 // processes)
        run(
            small,
            sst2,
            output,
            *flags,
            "--per_device_train_batch_size",
            size,
            processes=processes if processes > 1 else 0,
        )
        found.append(safetensors.torch.load_file(output / "adapter_model.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    assert max((tensor - 1).abs().max() for name, tensor in one.items() if name.endswith("up.bias")) > 1e-3


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_compute_the_same_and_are_saved_whole(process_group: None, tmp_path: Path) -> None:
    models = [get_peft_model(make("llama").bfloat16(), ParadeConfig(r=8)) for _ in range(2)]
    plain, sharded = models
    for model in models:
        torch.manual_seed(1)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    ids = torch.arange(24).reshape(2, 12)
    labels = torch.where(torch.arange(12) < 8, -100, ids)
    losses = [model(input_ids=ids, labels=labels).loss for model in models]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in models]
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name].full_tensor(), gradient)
    for number, model in enumerate(models):
        model.save_pretrained(str(tmp_path / str(number)), state_dict=adapter_state(model, torch.bfloat16))
    one, other = (load_adapter(tmp_path / str(number)).content_hash for number in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("flags", "version_2", "message"),
    [
        ({}, False, "fsdp_version"),
        ({"standardize": True}, True, "--standardize"),
        ({"metric_rows": 20}, True, "--metric_rows is 20"),
    ],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(flags: dict[str, Any], version_2: bool, message: str) -> None:
    options = AdapterArguments(model="m", train_file="f", **{"metric_rows": 0, **flags})
    trainer: Any = SimpleNamespace(
        options=options, tasks={"sst2": None}, accelerator=SimpleNamespace(is_fsdp2=version_2)
    )
    with pytest.raises(ValueError, match=message):
        _check_fsdp(trainer)


@pytest.mark.slow
def test_training_that_was_cut_off_resumes(small: str, sst2: Path, tmp_path: Path) -> None:
    """Training resumes from the last checkpoint and yields the same adapter, bit for bit."""
    output, results = tmp_path / "adapter", []
    flags = [
        "--max_steps",
        "6",
        "--eval_steps",
        "3",
        "--save_steps",
        "3",
        "--save_total_limit",
        "3",
        "--metric_rows",
        "0",
    ]
    for resume in ([], ["--resume_from_checkpoint", "true"]):
        run(small, sst2, output, *flags, *resume)
        results.append(safetensors.torch.load_file(output / "adapter_model.safetensors"))
        shutil.rmtree(output / "checkpoint-6")
    first, second = results
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
