# SPDX-License-Identifier: Apache-2.0
"""Training with --turns, from a file of conversations to an adapter with markers."""

import json
from pathlib import Path

import pytest

from tests.tasks import sentences
from vllm_parade.adapter import load_adapter
from vllm_parade.train.__main__ import parse
from vllm_parade.train.trainer import train

FLAGS = ["--per_device_train_batch_size", "4", "--learning_rate", "5e-3", "--eval_on_start", "--use_cpu", "true"]
START, END = [1, 4093], [1, 520, 9531]


def run(model: str, source: list[str], output: Path, *flags: str, steps: int = 2) -> list[float]:
    """Train for `steps` steps; return the dev losses."""
    every = ["--max_steps", str(steps), "--eval_steps", str(steps), "--save_steps", str(steps)]
    words = ["--model", model, *source, "--output_dir", str(output), "--dtype", "float32", *FLAGS, *every, *flags]
    train(*parse(words))
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in entries if "eval_loss" in entry]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a file of conversations with two questions each; the second answer depends on the first question."""
    file = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    answers = ("negative", "positive")
    rows = []
    for (sentence, label), (other, one) in zip(sentences()[:40], sentences()[1:41], strict=True):
        said = [sentence + "\nAnd:" + other, answers[one], "And the one before?", answers[label]]
        roles = ("user", "assistant", "user", "assistant")
        rows.append({"messages": [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]})
    rows[0]["messages"].insert(0, {"role": "system", "content": "You read reviews."})
    file.write_text("\n".join(map(json.dumps, rows)))
    return ["--train_file", str(file)]


def test_a_conversation_is_learnt_and_the_markers_are_saved(
    small: str, conversations: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = run(
        small, conversations, tmp_path, "--turns", "--max_instruction_tokens", "64", "--learning_rate", "3e-2", steps=20
    )
    assert losses[-1] < losses[0] - 1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = ("instruction_start_tokens", "instruction_end_tokens", "instruction_max_tokens")
    assert [config[key] for key in keys] == [START, END, 64]
    assert load_adapter(tmp_path).config.turn_markers is not None
    found = (
        "In every turn of a conversation, the generators read the instruction: from `<|im_start|>user` "
        f"(tokens {START}) to `<|im_start|>assistant` (tokens {END}), at most its last 64 tokens."
    )
    assert found in capsys.readouterr().out
    assert found in (tmp_path / "README.md").read_text()


def test_without_turns_the_last_answer_is_learnt(small: str, conversations: list[str], tmp_path: Path) -> None:
    run(small, conversations, tmp_path, "--max_length", "200")
    assert load_adapter(tmp_path).config.turn_markers is None
    assert "The generators read the whole prompt." in (tmp_path / "README.md").read_text()


def test_packed_conversations_have_the_same_loss(small: str, conversations: list[str], tmp_path: Path) -> None:
    flags = ["--turns", "--train_sampling_strategy", "sequential"]
    padded = run(small, conversations, tmp_path / "padded", *flags, "--per_device_eval_batch_size", "4")
    packed = run(small, conversations, tmp_path / "packed", *flags, "--per_device_eval_batch_size", "4", "--packed")
    assert packed == pytest.approx(padded, rel=1e-4)


def test_tasks_and_standardized_generators(small: str, sst2: Path, tmp_path: Path) -> None:
    flags = ["--turns", "--standardize", "true", "--bias_lr_ratio", "10", "--metric_rows", "4"]
    losses = run(small, ["--task", "sst2", "--data", str(sst2)], tmp_path, *flags, steps=4)
    assert losses[-1] < losses[0]
    assert load_adapter(tmp_path).config.turn_markers is not None
    assert "| eval_sst2 |" in (tmp_path / "README.md").read_text()
