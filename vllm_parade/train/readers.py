# SPDX-License-Identifier: Apache-2.0
"""Reads the files of each task. No training prompt of a task occurs in its dev or test split.

A file with a format error raises a ValueError that names the file and the line.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_parade.train.command import naming
from vllm_parade.train.messages import Message, as_messages
from vllm_parade.train.templates import (
    SST2_ANSWERS,
    boolq_prompt,
    e2e_prompt,
    rte_prompt,
    sst2_prompt,
    wikisql_prompt,
)

# Number of examples held out for dev, if a task has no dev split of its own.
DEV_EXAMPLES = 200
E2E_DEV_MEANINGS = 100
BOOLQ_TEST = 1000
RTE_ANSWERS = {"entailment": "yes", "not_entailment": "no"}
BOOLQ_ANSWERS = {True: "yes", False: "no"}
PAIR = '{"prompt": ..., "response": ...}'
WIKISQL_SEPARATOR = "--SEPARATOR--"
WIKISQL_ROW = re.compile(r"(?P<table>\S+) (?P<columns><c>.*?) <i> (?P<question>.*?) <s> (?P<sql>.*?) </s>", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A prompt and the correct answers. Training uses all of them; scoring uses the one nearest to an answer."""

    prompt: str | tuple[Message, ...]
    """A user's turn, or a conversation up to its last answer."""
    responses: tuple[str, ...]
    where: str = field(default="", compare=False)
    """Flag, file and line that it comes from, for errors; empty for a task's examples."""


@dataclass(frozen=True)
class Splits:
    """A task's examples."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    @classmethod
    def without_overlap(cls, train: Iterable[Example], dev: list[Example], test: list[Example]) -> "Splits":
        """Splits without training examples whose prompt also occurs in dev or test."""
        held_out = {example.prompt for example in (*dev, *test)}
        return cls([example for example in train if example.prompt not in held_out], dev, test)


def read_text(path: Path, newline: str | None = None) -> str:
    """Read a UTF-8 text file; `newline` as in `open`.

    Raises:
        ValueError: names the file, the reason and the remedy.
    """
    try:
        # utf-8-sig skips the byte order mark that some editors write.
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; expected a text file") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank, preceded by its location: file and line number."""
    # Not splitlines(): it also splits at characters that JSON may contain unescaped.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def _csv_rows(path: Path, **options: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield each row that is not blank, preceded by its location."""
    reader = csv.reader(io.StringIO(read_text(path, newline=""), newline=""), **options)
    try:
        for row in reader:
            if row:
                yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


@contextmanager
def _expecting(where: str, what: str) -> Iterator[None]:
    try:
        yield
    # RecursionError: JSON that is nested thousands of levels deep.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: expected {what} ({error!r})") from error


def read_sst2(folder: Path) -> Splits:
    """Read train.tsv, dev.tsv and test.tsv (sentence, tab, label) with whole sentences of the treebank."""
    return Splits.without_overlap(*(list(_sst2(folder / f"{split}.tsv")) for split in ("train", "dev", "test")))


def _sst2(path: Path) -> Iterator[Example]:
    for where, line in _lines(path):
        with _expecting(where, "a sentence, a tab and the label 0 or 1"):
            sentence, label = line.rsplit("\t", 1)
            answer = SST2_ANSWERS[("0", "1").index(label.strip())]
        yield Example(sst2_prompt(sentence.strip()), (answer,))


def read_rte(folder: Path) -> Splits:
    """Read GLUE's train.tsv, val.tsv (used as dev) and dev.tsv (used as test)."""
    return Splits.without_overlap(*(list(_rte(folder / f"{split}.tsv")) for split in ("train", "val", "dev")))


def _rte(path: Path) -> Iterator[Example]:
    for where, row in _csv_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE):
        # Only some of the files have a header line.
        if row[-1] == "label":
            continue
        with _expecting(where, "an index, two sentences and entailment or not_entailment, with tabs between them"):
            _, premise, hypothesis, label = row
            answer = RTE_ANSWERS[label]
        yield Example(rte_prompt(premise, hypothesis), (answer,))


def read_boolq(folder: Path) -> Splits:
    """Read val.jsonl, the official dev set, and split it by passage: 1,000 rows for the test, 200 for dev."""
    passages: dict[str, list[Example]] = {}
    for where, line in _lines(folder / "val.jsonl"):
        with _expecting(where, 'JSON with "passage", "question" and "label", true or false'):
            row = json.loads(line)
            example = Example(boolq_prompt(row["passage"], row["question"]), (BOOLQ_ANSWERS[row["label"]],))
            passages.setdefault(row["passage"], []).append(example)
    test, rest = _take(list(passages.values()), BOOLQ_TEST)
    dev, rest = _take(rest, DEV_EXAMPLES)
    return Splits.without_overlap((example for group in rest for example in group), dev, test)


def read_e2e(folder: Path) -> Splits:
    """Read devset.csv, split by meaning representation into train and dev, and testset_w_refs.csv.

    The challenge's own trainset.csv is not needed.
    """
    examples, test = _e2e(folder / "devset.csv"), _e2e(folder / "testset_w_refs.csv")
    stride = max(1, len(examples) // E2E_DEV_MEANINGS)
    return Splits.without_overlap(examples, examples[::stride][:E2E_DEV_MEANINGS], test)


def _e2e(path: Path) -> list[Example]:
    """One example per meaning representation with all its references, in the file's order."""
    references: dict[str, list[str]] = {}
    rows = _csv_rows(path)
    _, columns = next(rows, ("", []))
    for where, row in rows:
        with _expecting(where, "a row with the columns mr and ref, which the first row names"):
            values = dict(zip(columns, row, strict=True))
            references.setdefault(values["mr"], []).append(values["ref"].strip())
    return [Example(e2e_prompt(meaning), tuple(texts)) for meaning, texts in references.items()]


def read_wikisql(folder: Path) -> Splits:
    """Read validation.txt, split by table into train and dev, and test1000.txt.

    The files have questions, schemas and SQL, but no table rows.
    """
    tables: dict[str, list[Example]] = {}
    for table, example in _wikisql(folder / "validation.txt"):
        tables.setdefault(table, []).append(example)
    dev, rest = _take(list(tables.values()), DEV_EXAMPLES)
    test = [example for _, example in _wikisql(folder / "test1000.txt")]
    return Splits.without_overlap((example for group in rest for example in group), dev, test)


def _wikisql(path: Path) -> Iterator[tuple[str, Example]]:
    for row in read_text(path).split(WIKISQL_SEPARATOR):
        match = WIKISQL_ROW.search(row)
        if match is None:
            if row.strip():
                raise ValueError(f"{path}: not a row of WikiSQL: {row.strip()[:80]!r}")
            continue
        columns = [column.split("<t>")[0].strip() for column in match["columns"].split("<c>")[1:]]
        # The prompt includes the table's name, because the SQL contains it.
        table = f"{match['table']}: {', '.join(columns)}"
        yield match["table"], Example(wikisql_prompt(match["question"], table), (match["sql"].strip(),))


def read_jsonl(train: Path, dev: Path | None) -> Splits:
    """Read files of lines `{"prompt": ..., "response": ...}` or `{"messages": [...]}`.

    Without `dev`, every tenth example is dev, at most 200.

    Raises:
        ValueError: names the flag, the file and the line.
    """
    examples = _jsonl("--train_file", train)
    if dev is None:
        return Splits.without_overlap(examples, examples[::10][:DEV_EXAMPLES], [])
    return Splits.without_overlap(examples, _jsonl("--dev_file", dev), [])


def _jsonl(flag: str, path: Path) -> list[Example]:
    with naming(flag):
        lines = list(_lines(path))
    if not lines:
        raise ValueError(f"{flag} {path}: holds no example; expected lines {PAIR}")
    return [as_example(line, f"{flag} {where}") for where, line in lines]


def as_example(row: "str | dict", where: str) -> Example:
    """Make an example from a row with "prompt" and "response", or with "messages".

    Raises:
        ValueError: names the row.
    """
    with _expecting(where, PAIR):
        values = json.loads(row) if isinstance(row, str) else row
        conversation = "messages" in values and "response" not in values
        prompt, response = ("", "") if conversation else (values["prompt"], values["response"])
    if conversation:
        with naming(f"{where}:"):
            return _conversation(values["messages"], where)
    if not isinstance(prompt, str) or not isinstance(response, str) or not prompt or not response:
        raise ValueError(f"{where}: prompt and response must be non-empty strings")
    return Example(prompt, (response,), where)


def _conversation(values: Any, where: str) -> Example:
    messages = as_messages(values)
    return Example(messages[:-1], (messages[-1].content,), where)


def _take(groups: list[list[Example]], count: int) -> tuple[list[Example], list[list[Example]]]:
    """At most `count` examples of evenly spread whole groups, and the remaining groups."""
    total = sum(map(len, groups))
    stride = max(1, round(total / max(1, count)))
    taken: list[Example] = []
    left: list[list[Example]] = []
    for number, group in enumerate(groups):
        if number % stride == 0 and len(taken) < count:
            taken += group
        else:
            left.append(group)
    return taken[:count], left
