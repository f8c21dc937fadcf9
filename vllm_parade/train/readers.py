# SPDX-License-Identifier: Apache-2.0
"""How the files of each task are read. None of a task's training prompts occurs in its dev or test split."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_parade.train.templates import (
    SST2_ANSWERS,
    boolq_prompt,
    e2e_prompt,
    rte_prompt,
    sst2_prompt,
    wikisql_prompt,
)

# Examples that are kept from training where a task has no dev split of its own.
DEV_EXAMPLES = 200
E2E_DEV_MEANINGS = 100
BOOLQ_TEST = 1000
WIKISQL_SEPARATOR = "--SEPARATOR--"
WIKISQL_ROW = re.compile(r"(?P<table>\S+) (?P<columns><c>.*?) <i> (?P<question>.*?) <s> (?P<sql>.*?) </s>", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A user's turn and the answers that are right; training learns each of them, scoring takes the nearest."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """A task's examples."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    @classmethod
    def without_overlap(cls, train: Iterable[Example], dev: list[Example], test: list[Example]) -> "Splits":
        """Splits of which training loses what is held out."""
        held_out = {example.prompt for example in (*dev, *test)}
        return cls([example for example in train if example.prompt not in held_out], dev, test)


def read_sst2(folder: Path) -> Splits:
    """Read train.tsv, dev.tsv and test.tsv: sentence, tab, label; whole sentences of the treebank."""
    return Splits.without_overlap(*(list(_sst2(folder / f"{split}.tsv")) for split in ("train", "dev", "test")))


def _sst2(path: Path) -> Iterator[Example]:
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence, label = line.rsplit("\t", 1)
        yield Example(sst2_prompt(sentence.strip()), (SST2_ANSWERS[int(label)],))


def read_rte(folder: Path) -> Splits:
    """Read train.tsv, val.tsv (as dev) and dev.tsv (as test) of GLUE."""
    return Splits.without_overlap(*(list(_rte(folder / f"{split}.tsv")) for split in ("train", "val", "dev")))


def _rte(path: Path) -> Iterator[Example]:
    with path.open(encoding="utf-8", newline="") as file:
        for _, premise, hypothesis, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            # Not all of the files have a line of headings.
            if label != "label":
                yield Example(rte_prompt(premise, hypothesis), ("yes" if label == "entailment" else "no",))


def read_boolq(folder: Path) -> Splits:
    """Read val.jsonl, the official dev set, and split it by passage: 1,000 rows for the test, 200 for dev."""
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text(encoding="utf-8").splitlines()]
    passages: dict[str, list[Example]] = {}
    for row in rows:
        example = Example(boolq_prompt(row["passage"], row["question"]), ("yes" if row["label"] else "no",))
        passages.setdefault(row["passage"], []).append(example)
    test, rest = _take(list(passages.values()), BOOLQ_TEST)
    dev, rest = _take(rest, DEV_EXAMPLES)
    return Splits.without_overlap((example for group in rest for example in group), dev, test)


def read_e2e(folder: Path) -> Splits:
    """Read devset.csv, split by meaning representation into train and dev, and testset_w_refs.csv.

    The challenge's own trainset.csv is not needed.
    """
    examples, test = _e2e(folder / "devset.csv"), _e2e(folder / "testset_w_refs.csv")
    stride = len(examples) // E2E_DEV_MEANINGS
    return Splits.without_overlap(examples, examples[::stride][:E2E_DEV_MEANINGS], test)


def _e2e(path: Path) -> list[Example]:
    """One example a meaning representation, in the file's order, with all its references."""
    references: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"].strip())
    return [Example(e2e_prompt(meaning), tuple(texts)) for meaning, texts in references.items()]


def read_wikisql(folder: Path) -> Splits:
    """Read validation.txt, split by table into train and dev, and test1000.txt: questions, schemas, SQL, no rows."""
    tables: dict[str, list[Example]] = {}
    for table, example in _wikisql(folder / "validation.txt"):
        tables.setdefault(table, []).append(example)
    dev, rest = _take(list(tables.values()), DEV_EXAMPLES)
    test = [example for _, example in _wikisql(folder / "test1000.txt")]
    return Splits.without_overlap((example for group in rest for example in group), dev, test)


def _wikisql(path: Path) -> Iterator[tuple[str, Example]]:
    for row in path.read_text(encoding="utf-8").split(WIKISQL_SEPARATOR):
        match = WIKISQL_ROW.search(row)
        if match is None:
            if row.strip():
                raise ValueError(f"{path}: no row of WikiSQL: {row.strip()[:80]!r}")
            continue
        columns = [column.split("<t>")[0].strip() for column in match["columns"].split("<c>")[1:]]
        # The table's name is a number that tells nothing: the answer names it, so that the SQL is whole.
        table = f"{match['table']}: {', '.join(columns)}"
        yield match["table"], Example(wikisql_prompt(match["question"], table), (match["sql"].strip(),))


def read_jsonl(train: Path, dev: Path | None) -> Splits:
    """Read files of lines `{"prompt": ..., "response": ...}`; without `dev`, every tenth example up to 200 is it.

    Raises:
        ValueError: names file and line.
    """
    examples = list(_jsonl(train))
    if dev is not None:
        return Splits.without_overlap(examples, list(_jsonl(dev)), [])
    return Splits.without_overlap(examples, examples[::10][:DEV_EXAMPLES], [])


def _jsonl(path: Path) -> Iterator[Example]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield as_example(line, f"{path}, line {number}")


def as_example(row: "str | dict", where: str) -> Example:
    """An example out of a row with "prompt" and "response".

    Raises:
        ValueError: names the row.
    """
    try:
        values = json.loads(row) if isinstance(row, str) else row
        prompt, response = values["prompt"], values["response"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: expected {{"prompt": ..., "response": ...}} ({error!r})') from error
    if not isinstance(prompt, str) or not isinstance(response, str) or not prompt or not response:
        raise ValueError(f"{where}: prompt and response must be texts that are not empty")
    return Example(prompt, (response,))


def _take(groups: list[list[Example]], count: int) -> tuple[list[Example], list[list[Example]]]:
    """About `count` examples out of whole groups spread over all, and the groups that are left."""
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
