# SPDX-License-Identifier: Apache-2.0
"""`tools.conversations`: its conversations can be trained on and are reproducible by seed."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tools.conversations import SOURCES, build
from vllm_parade.train.data import encode
from vllm_parade.train.markers import find_markers
from vllm_parade.train.readers import read_jsonl


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A few rows of every source, in the source's format."""
    alpaca = [{"instruction": f"Do {n}.", "input": f"{n}" * (n % 2), "output": f" Done {n}. "} for n in range(30)]
    gsm8k = [{"question": f"{n} + {n}?", "answer": f"It is <<{n}+{n}>>{2 * n}.\n#### {2 * n}"} for n in range(30)]
    e2e = [f'"name[Pub {n}], area[riverside]",Pub {n} {text}.' for n in range(20) for text in ("is near", "is far")]
    contents = {
        "alpaca": json.dumps(alpaca),
        "gsm8k": "\n".join(map(json.dumps, gsm8k)),
        "e2e": "\n".join(["mr,ref", *e2e]),
        "sst2": "\n".join(f"sentence {n}\t{n % 2}" for n in range(31)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content + "\n")
    assert contents.keys() == SOURCES.keys()
    return {name: tmp_path / name for name in contents}


def test_every_source_gives_two_to_six_turns(files: dict[str, Path], smollm: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    markers = find_markers(tokenizer)
    for name, file in files.items():
        found = build({name: file}, 100, 0)
        turns = {sum(message["role"] == "user" for message in one) for one in found}
        assert len(turns) > 1, name
        assert turns <= set(range(2, 7)), name
        lines = tmp_path / "conversations.jsonl"
        lines.write_text("\n".join(json.dumps({"messages": one}) for one in found))
        splits = read_jsonl(lines, None)
        assert len(splits.train) + len(splits.dev) == len(found)
        encode(tokenizer, splits.train, markers=markers)


def test_no_row_is_used_twice_and_chance_has_a_seed(files: dict[str, Path]) -> None:
    found = build(files, 5, 0)
    assert len(found) == 20
    assert found == build(files, 5, 0) != build(files, 5, 1)
    for name, row in {"alpaca": "Do ", "sst2": "sentence "}.items():
        built = build({name: files[name]}, 100, 0)
        said = [line for one in built for message in one for line in message["content"].split("\n")]
        rows = [line for line in said if line.startswith(row)]
        assert len(rows) == len(set(rows)) >= 28


def test_second_answers_need_the_first_turn(files: dict[str, Path]) -> None:
    (first, second, *_), *_ = (
        [message["content"] for message in one if message["role"] == "user"]
        for one in build({"sst2": files["sst2"]}, 1, 0)
    )
    sentence, other, question = first.split("\n")
    assert (question, second) == ("The sentiment of the second sentence is:", "And the one before?")
    answers = [one["content"] for one in build({"sst2": files["sst2"]}, 1, 0)[0] if one["role"] == "assistant"]
    wanted = [("negative", "positive")[int(text.split()[1]) % 2] for text in (other, sentence)]
    assert answers[:2] == wanted
