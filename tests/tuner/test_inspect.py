# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_parade.inspect`: vectors of prompts, their prompt dependence, and pictures."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import get_peft_model

from tests.commands import refusal
from tests.documents import commands, texts
from tests.tuner.models import PAD, make
from tests.tuner.test_turns import CONVERSATIONS, MARKERS, marked
from vllm_parade.adapter.turns import find_turns
from vllm_parade.inspect import attention_maps, draw_attention, main, prompt_dependence, read_prompts, vectors
from vllm_parade.train.messages import Message
from vllm_parade.tuner import ParadeConfig

ADAPTER = Path(__file__).parents[2] / "examples/adapters/sst2"
TOKENIZER = SimpleNamespace(pad_token_id=PAD)


@pytest.fixture
def model() -> Any:
    model = get_peft_model(make("llama"), ParadeConfig(r=8, layers_to_transform=[0, 2])).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".parade_generator." in name:
            parameter.data.normal_(float(name.endswith("bias")), 0.5)
    return model


def test_vectors_of_padded_prompts_are_those_of_each_alone(model: Any) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    together = vectors(model, TOKENIZER, prompts)
    assert {layer: tuple(found.shape) for layer, found in together.items()} == {0: (2, 192), 2: (2, 192)}
    for number, prompt in enumerate(prompts):
        alone = vectors(model, TOKENIZER, [prompt])
        for layer, found in alone.items():
            torch.testing.assert_close(together[layer][number], found[0], atol=1e-4, rtol=1e-4)


def test_prompt_dependence() -> None:
    constant = prompt_dependence({0: torch.full((3, 4), 1.5)})
    assert constant == {"spread": 0.0, "distance": 0.5, "ratio": 0.0}
    half = prompt_dependence({0: torch.tensor([[1.0, 1.5], [2.0, 1.5]])})
    assert half["spread"] == pytest.approx((0.5**2 / 2) ** 0.5)
    assert half["distance"] == pytest.approx(0.5)
    assert prompt_dependence({0: torch.ones(2, 2)})["ratio"] == 0


def test_attention_maps_are_cut_and_add_up(model: Any) -> None:
    model.base_model.model.set_attn_implementation("eager")
    maps = attention_maps(model, list(range(3, 90)), [1])
    assert maps[1].shape == (4, 64, 64)
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(4, 64))


def test_turns_have_attention_maps_of_their_own(tmp_path: Path) -> None:
    """Each map covers a turn's instruction, as computed within the whole conversation."""
    pytest.importorskip("matplotlib")
    model = marked()
    model.base_model.model.set_attn_implementation("eager")
    ids, turns = CONVERSATIONS[0], find_turns(CONVERSATIONS[0], MARKERS)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[1][0]
    for turn in turns:
        maps = attention_maps(model, ids, [1], turn)
        torch.testing.assert_close(maps[1], whole[:, turn.start : turn.end, turn.start : turn.end])
    paths = draw_attention(model, ids, [0, 2], [0], tmp_path, MARKERS)
    assert [path.name for path in paths] == [
        f"attention_layer{layer}_turn{number}.png" for number in (1, 2, 3) for layer in (0, 2)
    ]
    assert all(path.is_file() for path in paths)


def test_vectors_are_those_of_the_last_turn() -> None:
    model = marked()
    found = vectors(model, TOKENIZER, CONVERSATIONS)
    (last,) = vectors(model, TOKENIZER, [CONVERSATIONS[0]])[1]
    torch.testing.assert_close(found[1][0], last, atol=1e-4, rtol=1e-4)
    shorter = vectors(model, TOKENIZER, [CONVERSATIONS[0][:15]])[1][0]
    assert not torch.allclose(last, shorter, atol=1e-2)
    # Generators do not read tokens after the instruction.
    answered = vectors(model, TOKENIZER, [[*CONVERSATIONS[0], 55, 56]])[1][0]
    torch.testing.assert_close(answered, last, atol=1e-4, rtol=1e-4)


def test_prompts_may_be_conversations(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    file.write_text(json.dumps({"messages": messages}) + '\n\n{"prompt": "p", "response": "r"}\n')
    wanted = tuple(Message(message["role"], message["content"]) for message in messages[:3])
    assert read_prompts(file) == [wanted, "p"]
    file.write_text('{"messages": []}')
    with pytest.raises(ValueError, match=rf"--prompts {file}, line 1: messages must be a list"):
        read_prompts(file)


@pytest.mark.slow
def test_pictures(smollm: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a gripping movie\nThe sentiment of the given sentence is:\n\ndull\n")
    (tmp_path / "adapters").symlink_to(ADAPTER.parent)
    (text,) = texts("docs/training.md", "tests/tuner/test_inspect.py::test_pictures", "bash")
    ((_, *words),) = commands(text, MODEL=smollm)

    command = [sys.executable, *words, "--layers", "0", "29"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("attention_layer0.png", "attention_layer29.png", "vectors.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5000
    assert "vectors over prompts: spread 0.0" in done.stdout


@pytest.fixture
def refused(smollm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command, which must refuse its input before it loads weights."""
    monkeypatch.setattr("vllm_parade.inspect.load_model", Mock(side_effect=AssertionError("a model is loaded")))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a gripping movie\n")

    def run(*flags: object, model: object = smollm) -> str:
        required = ("--model", model, "--adapter", ADAPTER, "--prompts", prompts, "--output", tmp_path / "pictures")
        line = refusal(main, *required, *flags)
        assert line.startswith("vllm_parade.inspect: ")
        return line.removeprefix("vllm_parade.inspect: ")

    return run


def test_bad_input_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    file, folder, missing = tmp_path / "file", tmp_path / "folder", tmp_path / "missing"
    file.write_bytes(b"\xff")
    folder.mkdir()
    remedy = "give the folder of a Hugging Face model or its name on the Hub"
    assert refused(model=missing) == f"--model {missing}: no such folder; {remedy}"
    assert refused(model=folder) == f"--model {folder}: the folder holds no config.json; {remedy}"
    assert refused("--prompts", missing).startswith(f"--prompts {missing}: cannot be read: No such file or directory")
    assert refused("--prompts", folder).startswith(f"--prompts {folder}: cannot be read: Is a directory")
    assert refused("--prompts", file).startswith(f"--prompts {file}: not UTF-8 text")
    assert refused("--adapter", missing).startswith(f"--adapter {missing}: no such folder; expected a folder that ")
    assert refused("--adapter", folder).startswith(f"--adapter {folder}/adapter_config.json: no such file; expected ")
    assert refused("--layers", 0, 30) == f"--layers: layer 30 has no vectors; expected some of {list(range(30))}"
    assert refused("--heads", 0, 9) == "--heads: the base model has no head 9; expected some of 0 to 8"
    assert refused("--heads", -1).startswith("--heads: the base model has no head -1")
    assert refused("--output", file).startswith(f"--output {file}: cannot be created: File exists")
    file.write_text("\n \n")
    assert refused("--prompts", file) == f"--prompts {file}: has no prompt; expected one per line"


def test_missing_packages_are_named(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused() == "not installed: matplotlib; install with: pip install 'vllm-parade[train]'"


def test_help_needs_no_package_of_the_extra() -> None:
    blocked = ("aenum", "matplotlib", "peft", "transformers")
    script = f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv[1:] = ['--help']\n"
    script += "runpy.run_module('vllm_parade.inspect', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--prompts PROMPTS" in done.stdout
