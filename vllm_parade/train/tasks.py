# SPDX-License-Identifier: Apache-2.0
"""The tasks that adapters are trained and scored on."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_parade.train.command import naming, require_modules
from vllm_parade.train.readers import (
    Example,
    Splits,
    read_boolq,
    read_e2e,
    read_rte,
    read_sst2,
    read_wikisql,
)
from vllm_parade.train.templates import SST2_ANSWERS

__all__ = ["TASKS", "Example", "Splits", "Task", "check_metric", "mixture", "read_task"]

YES_NO = ("no", "yes")


@dataclass(frozen=True)
class Task:
    """A task: `read` reads its folder, `metric` scores answers against examples from 0 to 100."""

    name: str
    metric_name: str
    max_new_tokens: int
    read: Callable[[Path], Splits]
    metric: Callable[[Sequence[str], Sequence[Example]], float]
    choices: tuple[str, ...] = ()
    """The possible answers, if there are only a few."""


def accuracy(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Per cent of answers whose first word, in lower case, is a correct response."""
    words = (re.search("[a-z]+", answer.lower()) for answer in answers)
    right = [word is not None and word[0] in e.responses for word, e in zip(words, examples, strict=True)]
    return 100 * sum(right) / len(right)


def logical_form(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Per cent of answers that equal a reference, ignoring case and white space."""
    right = [_plain(answer) in map(_plain, e.responses) for answer, e in zip(answers, examples, strict=True)]
    return 100 * sum(right) / len(right)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def rouge_l(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Mean ROUGE-L F-measure times 100, of each answer with its best reference, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score_multi(e.responses, answer)["rougeL"] for answer, e in zip(answers, examples, strict=True)]
    return 100 * sum(score.fmeasure for score in scores) / len(scores)


TASKS = {
    task.name: task
    for task in (
        Task("boolq", "accuracy", 4, read_boolq, accuracy, YES_NO),
        Task("e2e", "ROUGE-L", 80, read_e2e, rouge_l),
        Task("rte", "accuracy", 4, read_rte, accuracy, YES_NO),
        Task("sst2", "accuracy", 4, read_sst2, accuracy, SST2_ANSWERS),
        Task("wikisql", "logical form", 80, read_wikisql, logical_form),
    )
}


def read_task(name: str, folder: Path, *needed: str) -> Splits:
    """Read a task's examples from its folder and check that every split in `needed` has some.

    Raises:
        ValueError: names --data, the file or folder, and what was expected.
    """
    with naming("--data"):
        splits = TASKS[name].read(folder)
    for split in needed:
        if not getattr(splits, split):
            raise ValueError(
                f"--data {folder}: has no {split} example of task {name}; give a folder with complete files"
            )
    return splits


def check_metric(name: str) -> None:
    """Check that the package for a task's metric is installed.

    Raises:
        ValueError: names the package and the remedy.
    """
    if TASKS[name].metric is rouge_l:
        require_modules("rouge_score")


def mixture(splits: Sequence[Splits]) -> Splits:
    """Merge the training and dev examples of several tasks, for one adapter. The result has no test examples."""
    return Splits([e for s in splits for e in s.train], [e for s in splits for e in s.dev], [])
