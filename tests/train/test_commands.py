# SPDX-License-Identifier: Apache-2.0
"""The documented training commands run unchanged, for one step, on a small random model."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.documents import commands, read, texts
from tests.tasks import sentences
from vllm_parade.adapter import load_adapter
from vllm_parade.train.__main__ import parse
from vllm_parade.train.trainer import train

PAGE = "docs/training.md"
HERE = "tests/train/test_commands.py"
QUICK = ["--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", "--metric_rows", "2", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def small(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer model with SmolLM2's tokenizer and chat template."""
    folder = str(tmp_path_factory.mktemp("small"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.from_pretrained(smollm, **sizes, num_key_value_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder)
    return folder


def write_pairs(file: Path, first: str) -> None:
    """Write a file of examples; the page's example comes first."""
    more = [{"prompt": text, "response": ("negative", "positive")[label]} for text, label in sentences()]
    file.write_text("\n".join([first.strip(), *map(json.dumps, more)]) + "\n", encoding="utf-8")


def run(words: list[str]) -> Path:
    """Run the training command for one step; return the adapter's folder."""
    assert words[:3] == ["python", "-m", "vllm_parade.train"]
    adapter, arguments = parse([*words[3:], *QUICK])
    train(adapter, arguments)
    folder = Path(arguments.output_dir)
    assert (folder / "README.md").is_file()
    load_adapter(folder)
    return folder


def test_the_command_of_the_readme(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = (part for part in read("README.md").split("`") if part.startswith('{"prompt"'))
    write_pairs(tmp_path / "pairs.jsonl", line)
    (text,) = texts("README.md", f"{HERE}::test_the_command_of_the_readme", "bash")
    (words,) = commands(text, MODEL=small)
    assert run(words) == Path("adapters/mine")


def test_the_conversations_of_the_page(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{HERE}::test_the_conversations_of_the_page"
    ((line,), (text,)) = (texts(PAGE, name, language) for language in ("json", "bash"))
    write_pairs(tmp_path / "conversations.jsonl", line)
    # The first line goes to the dev split; add a conversation to train on.
    with (tmp_path / "conversations.jsonl").open("a") as file:
        file.write(line.strip().replace("dull", "slow"))
    (words,) = commands(text, MODEL=small)
    assert load_adapter(run(words)).config.instruction_start_tokens == (1, 4093)


def test_the_commands_of_the_page(small: str, sst2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{HERE}::test_the_commands_of_the_page"
    (line,), (settings,) = texts(PAGE, name, "json"), texts(PAGE, name, "yaml")
    write_pairs(tmp_path / "pairs.jsonl", line)
    (tmp_path / "settings.yaml").write_text(settings.replace("$MODEL", small), encoding="utf-8")
    folders = [
        run(words) for text in texts(PAGE, name, "bash") for words in commands(text, MODEL=small, DATA=str(sst2))
    ]
    assert [str(folder) for folder in folders] == [
        "adapters/mine",
        "adapters/sst2",
        "adapters/mine",
        "adapters/mixture",
    ]
    # adapters/mine is trained twice; the second run takes its settings from the YAML file.
    assert load_adapter("adapters/mine").config.r == 24
