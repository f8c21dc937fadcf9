# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m vllm_parade.train` and the equivalent YAML file."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig

from vllm_parade.adapter import AdapterError
from vllm_parade.train.__main__ import parse
from vllm_parade.train.methods import peft_config
from vllm_parade.tuner import ParadeConfig


def test_the_papers_settings_are_the_defaults(sst2: Path) -> None:
    options, settings = parse(["--model", "m", "--task", "sst2", "--data", str(sst2)])
    assert (options.method, options.template, options.peft) == ("parade", "chat", {})
    assert (settings.learning_rate, settings.warmup_steps, settings.num_train_epochs) == (1e-4, 0.06, 10)
    assert (settings.eval_steps, settings.patience, settings.lr_scheduler_type) == (200, 10, "linear")
    sizes = []
    for examples in (9_999, 10_000):
        settings.per_device_train_batch_size = 0
        settings.batch_for(examples)
        sizes.append(settings.per_device_train_batch_size)
    assert sizes == [16, 128]


def test_a_yaml_file_and_flags_on_top(tmp_path: Path, sst2: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"model: m\ntask: [sst2, sst2]\ndata: [{sst2}, {sst2}]\nlearning_rate: 2e-3\nmax_steps: 7\n"
        "peft: {r: 8, sites: [q, v]}\nbf16: false\n"
    )
    options, settings = parse([str(file), "--max_steps", "9"])
    assert options.task == ["sst2", "sst2"]
    assert options.peft == {"r": 8, "sites": ["q", "v"]}
    assert (settings.learning_rate, settings.max_steps) == (2e-3, 9)
    file.write_text("just words")
    with pytest.raises(ValueError, match=r"settings\.yaml holds a str; expected a mapping"):
        parse([str(file)])


def test_bad_settings_are_refused(sst2: Path) -> None:
    base = ["--model", "m"]
    for flags, message in (
        ([], "give one of --task, --train_file and --dataset; got none"),
        (["--task", "sst2", "--data", str(sst2), "--train_file", "f"], "got --task, --train_file"),
        (
            ["--train_file", "f", "--method", "lora", "--standardize", "true"],
            "--standardize and --bias_lr_ratio are for PARADE; drop them with --method lora",
        ),
        (["--train_file", "f", "--bias_lr_ratio", "-1"], "--bias_lr_ratio is -1.0; expected 0 or more"),
        (["--task", "sst2"], "--data names 0 folders for 1 tasks"),
        (["--task", "sst2", "--data", "nowhere"], "--data names 'nowhere', which is not a folder"),
        (["--task", "sst2", "--data", str(sst2), "--peft", "{r: 8"], "--peft got '{r: 8', which is no JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            parse([*base, *flags])


def test_methods() -> None:
    assert isinstance(peft_config("parade", {"r": 8}), ParadeConfig)
    lora, ia3 = peft_config("lora", {}), peft_config("ia3", {})
    assert isinstance(lora, LoraConfig)
    assert (lora.r, len(lora.target_modules)) == (4, 7)
    assert isinstance(ia3, IA3Config)
    with pytest.raises(ValueError, match="--peft got {'rank': 8} for parade"):
        peft_config("parade", {"rank": 8})
    with pytest.raises(AdapterError, match="r is 10"):
        peft_config("parade", {"r": 10})


def test_an_error_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_parade.train", "--model", "m"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vllm_parade.train: give one of --task")
    assert "Traceback" not in done.stderr
