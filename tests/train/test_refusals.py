# SPDX-License-Identifier: Apache-2.0
"""Bad input of `python -m vllm_parade.train`: one line with flag, value and remedy, before weights are loaded."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from tests.commands import refusal
from tests.templates import FORMATS
from vllm_parade.train.__main__ import main

PAIR = json.dumps({"prompt": "p", "response": "r"})
EXPECTED = 'expected {"prompt": ..., "response": ...}'


@pytest.fixture
def refused(weightless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command in an empty folder; of a repeated flag, the last value counts."""
    monkeypatch.chdir(tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"p{n}", "response": "r"}) for n in range(20)))

    def run(*flags: object, source: tuple[object, ...] = ("--train_file", pairs)) -> str:
        line = refusal(main, "--model", weightless, *source, "--output_dir", "out", *flags)
        assert line.startswith("vllm_parade.train: ")
        return line.removeprefix("vllm_parade.train: ")

    return run


@pytest.mark.parametrize("flag", ["--train_file", "--dev_file"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{file}: cannot be read: No such file or directory; expected a text file"),
        (b"", "{file}: holds no example; expected lines {pair}"),
        (b"\n  \n", "{file}: holds no example; expected lines {pair}"),
        (PAIR.encode("utf-16"), "{file}: not UTF-8 text (invalid start byte, byte 0); save it as UTF-8"),
        (f"{PAIR}\n{PAIR[:-3]}".encode(), "{file}, line 2: expected {pair} (JSONDecodeError("),
        (b'\n{"prompt": "p", "answer": "r"}', "{file}, line 2: expected {pair} (KeyError('response'))"),
        (b'["p", "r"]', "{file}, line 1: expected {pair} (TypeError("),
        (b'{"prompt": "p", "response": 3}', "{file}, line 1: prompt and response must be non-empty strings"),
        (b"[" * 100_000, "{file}, line 1: expected {pair} (RecursionError("),
        (f'{PAIR}\n{{"messages": []}}'.encode(), "{file}, line 2: messages must be a list with at least one question"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "{file}, line 1: message 1 has the role 'bot'; expected "),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "{file}, line 1: messages hold no message of the role "),
    ],
    ids=["missing", "empty", "blank", "utf16", "cut", "keys", "list", "number", "nested", "none", "role", "no_answer"],
)
def test_files_of_pairs(
    refused: Callable[..., str], tmp_path: Path, flag: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "given.jsonl"
    if content is not None:
        file.write_bytes(content)
    expected = message.format(file=file, pair=EXPECTED.removeprefix("expected "))
    assert refused(flag, file).startswith(f"{flag} {expected}")


def test_a_folder_of_pairs(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("--train_file", tmp_path).startswith(f"--train_file {tmp_path}: cannot be read: Is a directory")


def test_nothing_is_left_to_train_on(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(PAIR)
    line = refused("--train_file", file)
    assert line == f"--train_file {file}: no training example is left, because all prompts are in dev; add examples"
    assert refused("--train_file", file, "--dev_file", file) == line
    assert refused("--max_length", 3) == "--max_length is 3, and all 18 examples are longer; raise it"


def test_pairs_may_hold_any_character(refused: Callable[..., str], tmp_path: Path) -> None:
    """Only line feeds end a line, as in JSON Lines; a byte order mark is ignored."""
    file = tmp_path / "pairs.jsonl"
    row = json.dumps({"prompt": "a\u2028b\x85c", "response": "r"}, ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\n{PAIR[:-1]}".encode())
    assert refused("--train_file", file).startswith(f"--train_file {file}, line 3: {EXPECTED}")


def test_models(refused: Callable[..., str], weightless: Path, tmp_path: Path) -> None:
    remedy = "give the folder of a Hugging Face model or its name on the Hub"
    missing, empty, file, broken = (tmp_path / name for name in ("missing", "empty", "file", "broken"))
    empty.mkdir()
    broken.mkdir()
    file.write_text("words")
    (broken / "config.json").write_text('["no settings"]')
    assert refused("--model", missing) == f"--model {missing}: no such folder; {remedy}"
    assert refused("--model", "a/b/c") == f"--model a/b/c: no such folder; {remedy}"
    assert refused("--model", empty) == f"--model {empty}: the folder holds no config.json; {remedy}"
    for other in (file, broken):
        line = refused("--model", other)
        assert line.startswith(f"--model {other}: ")
        assert line.endswith(remedy)
    # The tests run offline, so the Hub cannot be reached.
    assert refused("--model", "nobody/nothing").startswith(
        "--model nobody/nothing: no such folder, and not available from the Hub: We couldn't connect"
    )
    line = refused()
    assert line.startswith(f"--model {weightless}: no usable weights: Error no file named model.safetensors")
    assert line.endswith(remedy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "--model {model}: no usable tokenizer: "),
        ({"chat_template.jinja": None}, "--template is chat, but the model's tokenizer has no chat template; give "),
        ({"tokenizer_config.json": {"eos_token": None}}, "--model {model}: the tokenizer has no end-of-sequence token"),
    ],
    ids=["missing", "template", "eos"],
)
def test_tokenizers(
    refused: Callable[..., str], weightless: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(weightless, model)
    for name, entries in changes.items():
        if entries is None:
            (model / name).unlink()
        else:
            (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | entries))
    assert refused("--model", model).startswith(message.format(model=model))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dev_rows", "0"], "--dev_rows is 0; expected 1 or more"),
        (["--metric_rows", "-1"], "--metric_rows is -1; expected 0 or more"),
        (["--max_length", "0"], "--max_length is 0; expected 1 or more"),
        (["--turns", "--max_instruction_tokens", "0"], "--max_instruction_tokens is 0; expected 1 or more"),
        (["--max_instruction_tokens", "9"], "--max_instruction_tokens is 9, but there is no --turns; add it, or drop"),
        (
            ["--turns", "--method", "lora"],
            "--turns is for PARADE, which reads instructions; drop it with --method lora",
        ),
        (
            ["--turns", "--template", "plain"],
            "--turns finds turns in the tokenizer's chat template, but --template is ",
        ),
        (
            ["--turns", "--peft", '{"instruction_end_tokens": [2]}'],
            "--turns sets the markers that --peft gives, instruction_end_tokens; drop one of the two",
        ),
        (
            ["--peft", '{"instruction_end_tokens": [2]}'],
            "--peft got {'instruction_end_tokens': [2]} for parade: instruction_end_tokens is given without ",
        ),
        (["--dtype", "float17"], "--dtype is float17; expected auto, bfloat16, float16 or float32"),
        (["--dtype", "int8"], "--dtype is int8; expected auto, bfloat16, float16 or float32"),
        (["--attention", "slow"], "--attention is slow; expected one of eager, "),
        (["--peft", '{"r": 10}'], "--peft got {'r': 10} for parade: r is 10, not a multiple of num_capsules, 4"),
        (["--peft", '{"layers_to_transform": [30]}'], "--peft: layers_to_transform names layer 30; expected 0 to 29"),
        (["--output_dir", "pairs.jsonl"], "--output_dir pairs.jsonl: cannot be created: File exists; give "),
        (["--output_dir", "pairs.jsonl/a"], "--output_dir pairs.jsonl/a: cannot be created: Not a directory; "),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint: out has no checkpoint; drop the flag"),
        (["--resume_from_checkpoint", "gone"], "--resume_from_checkpoint gone: no such folder; give a checkpoint's"),
        (
            ["--metric_for_best_model", "eval_metric"],
            "--metric_for_best_model is eval_metric, but --task is not given and --metric_rows 200; give eval_loss",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings(refused: Callable[..., str], flags: list[str], message: str) -> None:
    assert refused(*flags).startswith(message)


def test_turns_need_a_template_with_markers(refused: Callable[..., str], weightless: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(weightless, model)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(FORMATS["llama2"].template)
    line = refused("--turns", "--model", model)
    assert line.startswith(
        f"--turns cannot use the chat template of {model}: it begins an answer with the text ' [/INST]"
    )


def test_conversations_that_cannot_be_learnt(refused: Callable[..., str], tmp_path: Path) -> None:
    """Each error message names the line of the file."""
    file = tmp_path / "conversations.jsonl"
    roles = ("system", "assistant", "user", "assistant")
    messages = [{"role": role, "content": "w"} for role in roles]
    file.write_text(f"{PAIR}\n{json.dumps({'messages': messages})}")
    source = ("--train_file", file, "--dev_file", tmp_path / "pairs.jsonl")
    line = refused("--turns", source=source)
    assert line.startswith(f"--train_file {file}, line 2: the answer at token ")
    line = refused("--template", "plain", source=source)
    assert line == f"--train_file {file}, line 2: a conversation has no template plain; give --template chat"


def test_xformers_needs_a_gpu(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refused("--attention", "xformers") == "--attention is xformers, which needs a GPU; give sdpa"


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("train", None, "{file}: cannot be read: No such file or directory; expected a text file"),
        ("dev", "a film\t2", "{file}, line 1: expected a sentence, a tab and the label 0 or 1 (ValueError("),
        ("test", "a film\t1\nno label", "{file}, line 2: expected a sentence, a tab and the label 0 or 1 (ValueError("),
        ("train", "", "{folder}: has no train example of task sst2; give a folder with complete files"),
    ],
    ids=["missing", "label", "columns", "empty"],
)
def test_files_of_a_task(
    refused: Callable[..., str], sst2: Path, tmp_path: Path, split: str, content: str | None, message: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(sst2, folder)
    file = folder / f"{split}.tsv"
    file.unlink()
    if content is not None:
        file.write_text(content)
    line = refused(source=("--task", "sst2", "--data", folder))
    assert line.startswith("--data " + message.format(file=file, folder=folder))


def test_a_tasks_metric(refused: Callable[..., str], sst2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ("--task", "sst2", "--data", sst2)
    assert refused("--dev_file", "d", source=task).startswith("--dev_file is for --train_file; drop it")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    e2e = ("--task", "e2e", "--data", sst2)
    missing = "not installed: rouge_score; install with: pip install 'vllm-parade[train]'"
    assert refused(source=e2e) == missing
    assert refused("--metric_rows", 0, source=e2e).startswith(f"--data {sst2}/devset.csv: cannot be read")
    wanted = "--metric_for_best_model is eval_e2e, but --task is sst2 and --metric_rows 200; give eval_loss"
    assert refused("--metric_for_best_model", "eval_e2e", source=task) == wanted


def test_data_sets_of_the_hub(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ("--dataset", "some/pairs")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(source=hub) == "--dataset some/pairs needs the package datasets; pip install datasets"

    def hub_answers(answer: Any) -> None:
        package: Any = ModuleType("datasets")
        package.load_dataset = Mock(side_effect=[answer])
        monkeypatch.setitem(sys.modules, "datasets", package)

    hub_answers(FileNotFoundError("Dataset 'some/pairs' doesn't exist"))
    assert refused(source=hub).startswith("--dataset some/pairs: cannot be loaded: Dataset 'some/pairs' doesn't exist")
    pair = {"prompt": "p", "response": "r"}
    for answer, message in (
        ({"test": [pair]}, "--dataset some/pairs: has no examples in a split train, only test; give another data set"),
        ({"train": [pair, {"text": "t"}]}, f"--dataset some/pairs, train row 1: {EXPECTED} (KeyError('prompt'))"),
        ({"train": [pair]}, "--dataset some/pairs: no training example is left"),
    ):
        hub_answers(answer)
        assert refused(source=hub).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "settings.yaml: cannot be read: No such file or directory"),
        (b"a: [1", "settings.yaml: invalid YAML: while parsing a flow sequence"),
        (b"a: \xff", "settings.yaml: not UTF-8 text"),
    ],
    ids=["missing", "yaml", "utf8"],
)
def test_files_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("settings.yaml").write_bytes(content)
    assert refusal(main, "settings.yaml").startswith(f"vllm_parade.train: {message}")


def test_an_installation_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    line = refusal(main, "--help")
    assert line == "vllm_parade.train: not installed: peft, yaml; install with: pip install 'vllm-parade[train]'"
