# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_parade.evaluate`: the served answers' score, beside the reference's."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.documents import commands, texts
from tests.engines import DEFAULTS
from vllm_parade.evaluate import adapter_kind, parser
from vllm_parade.train.answers import score
from vllm_parade.train.tasks import TASKS

ADAPTER = Path(__file__).parents[2] / "examples/adapters/sst2"


@pytest.mark.engine
@pytest.mark.slow
def test_scores_are_those_of_the_reference(smollm: str, sst2: Path, tmp_path: Path) -> None:
    name = "tests/train/test_evaluate.py::test_scores_are_those_of_the_reference"
    (text,) = texts("docs/training.md", name, "bash")
    ((_, *words),) = commands(text, MODEL=smollm, DATA=str(sst2))
    (tmp_path / "adapters").symlink_to(ADAPTER.parent)
    flags = ["--split", "dev", "--engine", json.dumps(DEFAULTS), "--output", "scores.json"]
    command = [sys.executable, *words, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "scores.json").read_text())
    examples = TASKS["sst2"].read(sst2).dev
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    base = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    wanted = {"base model": score(TASKS["sst2"], base, tokenizer, examples, "chat")}
    wanted["mine"] = score(TASKS["sst2"], PeftModel.from_pretrained(base, ADAPTER), tokenizer, examples, "chat")
    assert found["scores"] == wanted
    assert f"| mine | {wanted['mine']:.1f} |" in done.stdout
    assert len(found["answers"]["mine"]) == len(examples)


def folder(path: Path, kind: str) -> tuple[str, str]:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}))
    return path.name, str(path)


def test_one_kind_of_adapter_that_vllm_serves(tmp_path: Path) -> None:
    parade, lora, ia3 = (folder(tmp_path / kind, kind) for kind in ("PARADE", "LORA", "IA3"))
    assert [adapter_kind([one]) for one in (parade, lora)] == ["PARADE", "LORA"]
    assert adapter_kind([]) == "PARADE"
    with pytest.raises(ValueError, match="kinds LORA, PARADE; one engine serves one kind"):
        adapter_kind([parade, lora])
    with pytest.raises(ValueError, match="kind IA3, which vLLM does not serve"):
        adapter_kind([ia3])


def test_adapters_are_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, path = folder(tmp_path / "mine", "PARADE")
    flags = ["--model", "m", "--task", "sst2", "--data", str(tmp_path), "--adapter"]
    args: argparse.Namespace = parser().parse_args([*flags, f"{name}={path}"])
    assert args.adapter == [(name, path)]
    with pytest.raises(SystemExit):
        parser().parse_args([*flags, "somewhere"])
    assert "'somewhere': expected NAME=PATH, the folder of an adapter" in capsys.readouterr().err
