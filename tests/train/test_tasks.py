# SPDX-License-Identifier: Apache-2.0
"""Reading of tasks and scoring of answers."""

import csv
import json
from pathlib import Path

import pytest

from vllm_parade.train.messages import Message
from vllm_parade.train.readers import Example, read_jsonl
from vllm_parade.train.tasks import TASKS, mixture
from vllm_parade.train.templates import boolq_prompt, e2e_prompt, rte_prompt, sst2_prompt, wikisql_prompt


def test_sst2_is_read_without_what_is_held_out(sst2: Path) -> None:
    splits = TASKS["sst2"].read(sst2)
    assert len(splits.train) == 60
    assert splits.train[0] == Example(sst2_prompt("a moving film"), ("positive",))
    assert splits.train[1] == Example(sst2_prompt("a dull film"), ("negative",))
    assert not {example.prompt for example in splits.train} & {example.prompt for example in splits.dev}


def test_rte_answers_yes_or_no(tmp_path: Path) -> None:
    for name, label in (("train", "entailment"), ("val", "not_entailment"), ("dev", "entailment")):
        # As in GLUE's files, quotation marks are plain text.
        head = "" if name == "val" else "index\tsentence1\tsentence2\tlabel\n"
        (tmp_path / f"{name}.tsv").write_text(f'{head}0\t"He said {name}.\tHe spoke.\t{label}\n')
    splits = TASKS["rte"].read(tmp_path)
    assert splits.train == [Example(rte_prompt('"He said train.', "He spoke."), ("yes",))]
    assert splits.dev[0].responses == ("no",)
    assert splits.test[0].prompt == rte_prompt('"He said dev.', "He spoke.")


def test_boolq_splits_by_passage(tmp_path: Path) -> None:
    rows = [
        {"passage": f"passage {number // 2}", "question": f"question {number}", "label": number % 3 == 0}
        for number in range(3000)
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = TASKS["boolq"].read(tmp_path)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (1800, 200, 1000)
    passages = [{e.prompt.splitlines()[1] for e in part} for part in (splits.train, splits.dev, splits.test)]
    assert not passages[0] & passages[1] | passages[0] & passages[2] | passages[1] & passages[2]
    assert splits.test[0] == Example(boolq_prompt("passage 0", "question 0"), ("yes",))


def test_e2e_is_split_by_meaning(tmp_path: Path) -> None:
    for name, meanings in {"devset.csv": 300, "testset_w_refs.csv": 2}.items():
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for number in range(meanings):
                for text in ("first", "second"):
                    writer.writerow([f"name[{name} {number}]", f"{text} of {number}"])
    splits = TASKS["e2e"].read(tmp_path)
    assert len(splits.train) == 200
    assert len(splits.dev) == 100
    assert not {example.prompt for example in splits.train} & {example.prompt for example in splits.dev}
    assert splits.test[1] == Example(e2e_prompt("name[testset_w_refs.csv 1]"), ("first of 1", "second of 1"))


def test_wikisql_is_split_by_table(tmp_path: Path) -> None:
    def row(table: int, number: int) -> str:
        columns = "<c> Player <t> text <c> No. <t> real"
        sql = f"SELECT Player FROM table_{table} WHERE No. = {number}"
        return f"\ntable_{table} {columns} <i> Who is {number}? <s> {sql} </s>\n"

    for name, tables in (("validation", range(300)), ("test1000", range(900, 902))):
        rows = [row(table, number) for table in tables for number in range(2)]
        (tmp_path / f"{name}.txt").write_text("--SEPARATOR--".join([*rows, "\n"]))
    splits = TASKS["wikisql"].read(tmp_path)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (400, 200, 4)
    assert splits.test[1] == Example(
        wikisql_prompt("Who is 1?", "table_900: Player, No."), ("SELECT Player FROM table_900 WHERE No. = 1",)
    )
    (tmp_path / "test1000.txt").write_text("something else")
    with pytest.raises(ValueError, match=r"test1000\.txt: not a row of WikiSQL: 'something else'"):
        TASKS["wikisql"].read(tmp_path)


def test_ones_own_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"p{n}", "response": f"r{n}"}) for n in range(30)) + "\n\n")
    splits = read_jsonl(file, None)
    assert [example.prompt for example in splits.dev] == ["p0", "p10", "p20"]
    assert len(splits.train) == 27
    assert len(read_jsonl(file, file).train) == 0
    for bad in ("no json", '{"prompt": "p"}', '{"prompt": "p", "response": ""}', '["p", "r"]'):
        file.write_text('{"prompt": "p", "response": "r"}\n' + bad)
        with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2: "):
            read_jsonl(file, None)


def test_ones_own_conversations(tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    contents = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    messages = [{"role": role, "content": content} for role, content in contents]
    pair = {"prompt": "p", "response": "r"}
    file.write_text("\n".join(map(json.dumps, [pair, {"messages": messages}, {"messages": messages[1:3]}])))
    splits = read_jsonl(file, None)
    assert splits.dev == [Example("p", ("r",))]
    prompts = [tuple(Message(*content) for content in part) for part in (contents[:-1], contents[1:2])]
    assert splits.train == [Example(prompts[0], ("e",)), Example(prompts[1], ("c",))]
    assert [example.where for example in splits.train] == [f"--train_file {file}, line {n}" for n in (2, 3)]
    assert not read_jsonl(file, file).train


def test_a_mixture_keeps_tests_apart(sst2: Path) -> None:
    splits = TASKS["sst2"].read(sst2)
    both = mixture([splits, splits])
    assert (len(both.train), len(both.dev), both.test) == (120, 16, [])


def test_scores() -> None:
    examples = [Example("p", ("positive",)), Example("p", ("negative",)), Example("p", ("positive",))]
    assert TASKS["sst2"].metric(["Positive.", "It is negative", " positive"], examples) == pytest.approx(200 / 3)
    review = [Example("p", ("the pub is cheap", "a cheap pub by the river"))]
    assert TASKS["e2e"].metric(["a cheap pub by the river"], review) == pytest.approx(100)
    assert 0 < TASKS["e2e"].metric(["the pub"], review) < 100
    query = [Example("p", ("SELECT Player FROM t WHERE No. = 3",))]
    assert TASKS["wikisql"].metric(["select  player FROM t where No. = 3"], query) == 100
    assert TASKS["wikisql"].metric(["SELECT Player FROM t WHERE No. = 33"], query) == 0
