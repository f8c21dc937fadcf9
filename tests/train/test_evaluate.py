# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_parade.evaluate`: scores of served answers, compared with the reference."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from testing.random_models import INNER, make_adapter
from tests.commands import refusal
from tests.documents import commands, texts
from tests.engines import DEFAULTS
from vllm_parade.adapter import BaseModelShape
from vllm_parade.evaluate import Server, adapter_kind, main, parser
from vllm_parade.train.answers import score
from vllm_parade.train.tasks import TASKS

ADAPTER = Path(__file__).parents[2] / "examples/adapters/sst2"


@pytest.mark.engine
@pytest.mark.slow
def test_scores_are_those_of_the_reference(small: str, sst2: Path, tmp_path: Path) -> None:
    shape = BaseModelShape.from_hf_config(AutoConfig.from_pretrained(small))
    adapter = make_adapter(tmp_path / "adapters" / "sst2", shape, 0, inner=INNER).path
    name = "tests/train/test_evaluate.py::test_scores_are_those_of_the_reference"
    (text,) = texts("docs/training.md", name, "bash")
    ((_, *words),) = commands(text, MODEL=small, DATA=str(sst2))
    flags = ["--split", "dev", "--engine", json.dumps(DEFAULTS), "--output", "scores.json"]
    command = [sys.executable, *words, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "scores.json").read_text())
    examples = TASKS["sst2"].read(sst2).dev
    tokenizer = AutoTokenizer.from_pretrained(small)
    base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    wanted = {"base model": score(TASKS["sst2"], base, tokenizer, examples, "chat")}
    wanted["mine"] = score(TASKS["sst2"], PeftModel.from_pretrained(base, adapter), tokenizer, examples, "chat")
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
    with pytest.raises(ValueError, match="types LORA, PARADE; give adapters of one type"):
        adapter_kind([parade, lora])
    with pytest.raises(ValueError, match="type IA3, which vLLM does not serve"):
        adapter_kind([ia3])


def test_adapters_are_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, path = folder(tmp_path / "mine", "PARADE")
    flags = ["--model", "m", "--task", "sst2", "--data", str(tmp_path), "--adapter"]
    args: argparse.Namespace = parser().parse_args([*flags, f"{name}={path}"])
    assert args.adapter == [(name, path)]
    with pytest.raises(SystemExit):
        parser().parse_args([*flags, "somewhere"])
    assert "'somewhere': expected NAME=PATH with the folder of an adapter" in capsys.readouterr().err


@pytest.fixture
def refused(smollm: str, sst2: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command, which must refuse its flags before it starts an engine."""
    monkeypatch.setattr("vllm_parade.evaluate.Server", Mock(side_effect=AssertionError("an engine starts")))

    def run(*flags: object, model: object = smollm, data: object = sst2) -> str:
        line = refusal(main, "--model", model, "--task", "sst2", "--data", data, *flags)
        assert line.startswith("vllm_parade.evaluate: ")
        return line.removeprefix("vllm_parade.evaluate: ")

    return run


def test_bad_models_are_refused(refused: Callable[..., str], weightless: Path, tmp_path: Path) -> None:
    remedy = "give the folder of a Hugging Face model or its name on the Hub"
    assert refused(model=tmp_path / "a/b") == f"--model {tmp_path}/a/b: no such folder; {remedy}"
    assert refused(model=tmp_path) == f"--model {tmp_path}: the folder holds no config.json; {remedy}"
    model = tmp_path / "model"
    shutil.copytree(weightless, model)
    (model / "chat_template.jinja").unlink()
    assert refused(model=model).startswith("--template is chat, but the model's tokenizer has no chat template")


def test_bad_data_is_refused(refused: Callable[..., str], sst2: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert refused(data=data).startswith(f"--data {data}/train.tsv: cannot be read: No such file or directory")
    shutil.copytree(sst2, data)
    (data / "test.tsv").write_text("")
    line = refused(data=data)
    assert line == f"--data {data}: has no test example of task sst2; give a folder with complete files"
    (data / "test.tsv").write_text("a film")
    assert refused(data=data).startswith(f"--data {data}/test.tsv, line 1: expected a sentence, a tab and the label")
    for flag in ("--rows", "--num_beams"):
        assert refused(flag, 0) == f"{flag} is 0; expected 1 or more"


def test_bad_adapters_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    def given(config: str) -> tuple[str, str]:
        path = tmp_path / "given"
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(config)
        return "--adapter", f"a={path}"

    file = tmp_path / "given/adapter_config.json"
    assert refused(*given("{")).startswith(f"--adapter {file}: invalid JSON: ")
    assert refused(*given("[]")) == f"--adapter {file}: has no peft_type; expected PEFT's config of an adapter"
    assert refused(*given('{"peft_type": "LORA", "r": "8"}')).startswith(f"--adapter {file}: r is '8'; expected a ")
    line = refused(*given('{"peft_type": "PARADE"}'))
    assert line.startswith(f"--adapter {tmp_path}/given/adapter_model.safetensors: no such file; expected ")
    line = refused(*given('{"peft_type": "LORA", "r": 600}'))
    assert line == "--adapter names a LoRA of r 600; vLLM serves at most 512"
    twice = refused("--adapter", f"a={ADAPTER}", f"a={ADAPTER}")
    assert twice == "--adapter: the name 'a' is already taken; give each adapter its own name"
    assert refused("--adapter", f"base model={ADAPTER}").startswith("--adapter: the name 'base model' is already taken")


def test_results_without_a_place_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused("--output", tmp_path) == f"--output {tmp_path}: is a folder; give a file"
    line = refused("--output", tmp_path / "file/scores.json")
    assert line.startswith(f"--output {tmp_path}/file: cannot be created: ")


def test_missing_packages_are_named(refused: Callable[..., str], sst2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert refused() == "not installed: vllm; install with: pip install 'vllm-parade[cuda]' or 'vllm-parade[cpu]'"
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert refused("--task", "e2e").startswith("not installed: rouge_score; install with: pip install ")


@pytest.mark.parametrize(("given", "said"), [("{", "invalid JSON"), ("[1]", "expected a JSON object")])
def test_engine_arguments_are_an_object(capsys: pytest.CaptureFixture[str], given: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--model", "m", "--task", "sst2", "--data", "d", "--engine", given])
    assert ended.value.code == 2
    assert f"argument --engine: {given!r}" in (message := capsys.readouterr().err)
    assert said in message


def test_what_vllm_refuses_names_the_flags(smollm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test creates only the engine's config, not the engine."""
    from vllm.engine.arg_utils import EngineArgs

    def config_only(model: str, **options: Any) -> None:
        EngineArgs(model, **options).create_engine_config()

    monkeypatch.setattr("vllm.LLM", config_only)
    with pytest.raises(ValueError, match=r"refuses --model .* with --engine .*unexpected keyword argument 'nosuch'"):
        Server(smollm, [], {"nosuch": 1})
    with pytest.raises(ValueError, match="(?s)^vLLM refuses --model .* with --engine .*is greater than the derived"):
        Server(smollm, [], {"max_model_len": 1 << 30})
    with pytest.raises(ValueError, match="^--model nobody/nothing: no such folder, and not available from the Hub: "):
        Server("nobody/nothing", [], {})
    other = BaseModelShape(32, 2, {"q": 32, "k": 32, "v": 32, "gate": 64, "up": 64})
    misfit = make_adapter(tmp_path / "misfit", other, 0)
    with pytest.raises(ValueError, match=rf"^--adapter {misfit.path}/adapter_model.safetensors: tensor .* has shape"):
        Server(smollm, [("misfit", misfit.path)], {})
    with pytest.raises(ValueError, match="^--enable-lora cannot be used with --enable-parade"):
        Server(smollm, [("mine", str(ADAPTER))], {"enable_lora": True})
    monkeypatch.setattr("vllm.LLM", Mock(side_effect=TypeError("a fault")))
    with pytest.raises(TypeError, match="a fault"):
        Server(smollm, [], {})
