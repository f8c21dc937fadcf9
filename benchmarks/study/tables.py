# SPDX-License-Identifier: Apache-2.0
"""The study's records as Markdown tables."""

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.report import Record

STRANGERS = "loss_added_by_strangers_vectors"


def best_rate(records: Sequence[Record]) -> list[Record]:
    """The records of the learning rate with the lowest median dev loss over seeds."""
    by_rate: dict[float, list[Record]] = {}
    for record in records:
        by_rate.setdefault(record["lr"], []).append(record)
    return min(by_rate.values(), key=lambda mine: statistics.median(record["dev_loss"] for record in mine))


def study_tables(records: Sequence[Record]) -> str:
    """Tables of quality, and for PARADE of the effect of the prompt: median and range over seeds at the best rate.

    `dependence` is the spread of the vectors over the prompts of all tasks, as a share of their distance from one.
    `within tasks` is the same over the prompts of one task, as a mean over tasks. `strangers` is the increase of the
    loss when each pair gets the vectors of another prompt, of another task if there are several. A task's column in the
    second table is the decrease of its metric when each request gets another prompt's vectors. Adapters of one task
    have separate tables, because each has its own metric. Columns without values are left out.
    """
    several = [record for record in records if len(record["tasks"]) > 1]
    single = [_single(record) for record in records if len(record["tasks"]) == 1]
    return "\n\n".join(table for some in (several, single) if some for table in _tables(some))


def _single(record: Record) -> Record:
    """The record of an adapter of one task, with the task's name replaced by `metric`."""
    (task,) = record["tasks"]
    measured = {f"metric{name.removeprefix(task)}": value for name, value in record.items() if name.startswith(task)}
    return {**record, "tasks": ["metric"], **measured}


def _tables(records: Sequence[Record]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["group"], record["variant"]), []).append(record)
    best = {key: best_rate(mine) for key, mine in groups.items()}
    tasks = list(dict.fromkeys(task for record in records for task in record["tasks"]))
    quality = [
        [
            *key,
            f"{mine[0]['parameters']:,}",
            f"{mine[0]['lr']:g}",
            str(len(mine)),
            _median([record["dev_loss"] for record in mine], 3),
            *(_median([record[task] for record in mine if task in record], 1) for task in tasks),
        ]
        for key, mine in best.items()
    ]
    yield _table(["group", "method", "parameters", "lr", "seeds", "dev loss", *tasks], quality)
    worth = [
        [
            group,
            _median([record["dependence"]["ratio"] for record in mine if "dependence" in record], 3),
            _median([_within_tasks(record) for record in mine if len(tasks) > 1], 3),
            _median([record[STRANGERS] for record in mine if STRANGERS in record], 3),
            *(_median([_loss(record, task) for record in mine if task in record], 1) for task in tasks),
        ]
        for (group, method), mine in best.items()
        if method == "parade"
    ]
    if worth:
        columns = ("group", "dependence", "within tasks", "strangers", *tasks)
        kept = [number for number, values in enumerate(zip(*worth, strict=True)) if any(values)]
        yield _table([columns[n] for n in kept], [[line[n] for n in kept] for line in worth])


def _within_tasks(record: Record) -> float:
    return statistics.mean(record[f"{task}_dependence"]["ratio"] for task in record["tasks"])


def _loss(record: Record, task: str) -> float:
    return record[task] - record[f"{task}_swapped"]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def _median(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
