# SPDX-License-Identifier: Apache-2.0
"""Tasks to train adapters for: how each one's files are read and how its answers are scored."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_parade.train.templates import SST2_ANSWERS, e2e_prompt, sst2_prompt

__all__ = ["TASKS", "Example", "Splits", "Task"]

E2E_DEV_MEANINGS = 100


@dataclass(frozen=True)
class Example:
    """A user's turn and the answers that are right; training learns each of them, scoring takes the nearest."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """A task's examples; none of train's prompts occurs in dev or test."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Task:
    """A task: `load` reads its folder, `metric` scores answers against examples on a scale of 0 to 100."""

    name: str
    metric_name: str
    max_new_tokens: int
    load: Callable[[Path], Splits]
    metric: Callable[[Sequence[str], Sequence[Example]], float]
    choices: tuple[str, ...] = ()
    """The possible answers, where there are only a few."""


def load_sst2(folder: Path) -> Splits:
    """Read train.tsv, dev.tsv and test.tsv: sentence, tab, label; whole sentences of the treebank."""
    train, dev, test = (_read_sst2(folder / f"{split}.tsv") for split in ("train", "dev", "test"))
    held_out = {example.prompt for example in dev + test}
    return Splits([example for example in train if example.prompt not in held_out], dev, test)


def load_e2e(folder: Path) -> Splits:
    """Read devset.csv, split by meaning representation into train and dev, and testset_w_refs.csv.

    The challenge's own trainset.csv is not needed.
    """
    examples, test = _read_e2e(folder / "devset.csv"), _read_e2e(folder / "testset_w_refs.csv")
    stride = len(examples) // E2E_DEV_MEANINGS
    dev = examples[::stride][:E2E_DEV_MEANINGS]
    held_out = {example.prompt for example in dev + test}
    return Splits([example for example in examples if example.prompt not in held_out], dev, test)


def accuracy(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Per cent of answers whose first word, in lower case, is the right one."""
    words = (re.search("[a-z]+", answer.lower()) for answer in answers)
    right = [word is not None and word[0] in e.responses for word, e in zip(words, examples, strict=True)]
    return 100 * sum(right) / len(right)


def rouge_l(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Mean ROUGE-L F-measure, times 100, of each answer with the nearest of its references; no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score_multi(e.responses, answer)["rougeL"] for answer, e in zip(answers, examples, strict=True)]
    return 100 * sum(score.fmeasure for score in scores) / len(scores)


def _read_sst2(path: Path) -> list[Example]:
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(sst2_prompt(sentence.strip()), (SST2_ANSWERS[int(label)],)) for sentence, label in rows]


def _read_e2e(path: Path) -> list[Example]:
    """One example a meaning representation, in the file's order, with all its references."""
    references: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"].strip())
    return [Example(e2e_prompt(meaning), tuple(texts)) for meaning, texts in references.items()]


TASKS = {
    "e2e": Task("e2e", "ROUGE-L", 80, load_e2e, rouge_l),
    "sst2": Task("sst2", "accuracy", 4, load_sst2, accuracy, SST2_ANSWERS),
}
