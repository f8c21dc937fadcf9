# SPDX-License-Identifier: Apache-2.0
"""What the study runs, and its tables."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.senders import SENDERS_TASK
from benchmarks.stacked import Hyperparameters
from benchmarks.study import Group, Record

ALL_TASKS = ("sst2", "rte", "boolq", "e2e", "wikisql")
SEEDS = (0, 1, 2)
RATES = {"parade": (5e-3, 1e-2, 2e-2), "lora": (1e-3, 3e-3, 1e-2), "ia3": (1e-2, 3e-2, 1e-1)}
# Of those for which PARADE beside PARADE is compared.
FEW_RATES = (5e-3, 1e-2)
MIXTURE_STEPS, TASK_STEPS = 800, 400
# The paper's Table 6 beside PARADE itself, which is the mixture's.
VARIANTS: dict[str, dict[str, Any]] = {
    "PARADE-1": {"pooler": "last_token"},
    "PARADE-2": {"pooler": "dynamic_routing"},
    "PARADE-3": {"sites": ["q", "k", "v", "gate", "up"], "r": 8},
    "PARADE-4": {"sites": ["q", "v"], "r": 24},
}
# Beside r=12, which is the mixture's.
BUDGETS = (3, 6, 24, 48)
# Ways to make the prompt matter. At the usual initial scale the pooler's squash leaves almost nothing of what it read
# (g(z) of 1e-5 under the first norm, on SmolLM2), and the first token's outliers drown the rest of the residual stream:
# generators begin wider, read after the norm, or only the user's own words.
ATTENTION_INPUT = {"generator_input": "attention_input"}
CONDITIONS: dict[str, dict[str, Any]] = {
    "attention input": {"settings": ATTENTION_INPUT},
    "wide": {"initial_std": 10.0},
    "own words, wide": {"own_words": True, "initial_std": 10.0},
    "attention input, wide": {"settings": ATTENTION_INPUT, "initial_std": 30.0},
    "attention input, own words, wide": {"settings": ATTENTION_INPUT, "own_words": True, "initial_std": 30.0},
    "attention input, wide, bias slow": {"settings": ATTENTION_INPUT, "initial_std": 30.0, "bias_lr": 0.1},
    "attention input, wide, bias fixed": {"settings": ATTENTION_INPUT, "initial_std": 30.0, "bias_lr": 0.0},
}


def _runs(rates: Sequence[float], **options: float) -> tuple[Hyperparameters, ...]:
    return tuple(Hyperparameters(lr, seed, **options) for lr, seed in product(rates, SEEDS))


def _methods(name: str, tasks: tuple[str, ...], steps: int) -> Iterator[Group]:
    """All methods beside each other, each with its rates."""
    for method, rates in RATES.items():
        yield Group(name, method, tasks, _runs(rates), steps=steps)


def _parade(
    name: str,
    tasks: tuple[str, ...] = ALL_TASKS,
    settings: dict[str, Any] | None = None,
    own_words: bool = False,
    **options: float,
) -> Group:
    """A kind of PARADE."""
    runs = _runs(FEW_RATES, **options)
    return Group(name, "parade", tasks, runs, settings or {}, steps=MIXTURE_STEPS, own_words=own_words)


def plan(name: str) -> Iterator[Group]:
    """Groups of a part of the study.

    Raises:
        KeyError: there is no such part.
    """
    yield from PARTS[name]()


def _mixture() -> Iterator[Group]:
    yield from _methods("mixture", ALL_TASKS, MIXTURE_STEPS)


def _conditions() -> Iterator[Group]:
    for name, options in CONDITIONS.items():
        yield _parade(f"conditions/{name}", **options)


def _senders() -> Iterator[Group]:
    tasks = (SENDERS_TASK.name,)
    yield from _methods("senders", tasks, MIXTURE_STEPS)
    for name in ("wide", "attention input, wide"):
        yield _parade(f"senders/{name}", tasks, **CONDITIONS[name])


def _variants() -> Iterator[Group]:
    for name, settings in VARIANTS.items():
        yield _parade(f"variants/{name}", settings=settings)


def _budgets() -> Iterator[Group]:
    for r in BUDGETS:
        yield _parade(f"budgets/r={r}", settings={"r": r, "num_capsules": 3 if r % 4 else 4})


def _tasks() -> Iterator[Group]:
    for task in ALL_TASKS:
        yield from _methods(f"tasks/{task}", (task,), TASK_STEPS)


# What matters most comes first.
PARTS = {
    "mixture": _mixture,
    "senders": _senders,
    "conditions": _conditions,
    "variants": _variants,
    "budgets": _budgets,
    "tasks": _tasks,
}


def best_rate(records: Sequence[Record]) -> list[Record]:
    """The records of the learning rate whose median dev loss over seeds is lowest."""
    by_rate: dict[float, list[Record]] = {}
    for record in records:
        by_rate.setdefault(record["lr"], []).append(record)
    return min(by_rate.values(), key=lambda mine: statistics.median(record["dev_loss"] for record in mine))


def study_tables(records: Sequence[Record]) -> str:
    """Medians over seeds at the best learning rate, and their range: quality, and of PARADE what the prompt is worth.

    `dependence` is how far vectors lie apart, over the prompts of all tasks, as a share of their distance from one, and
    behind it the mean over prompts of one task; a task's column is what its metric loses when every request gets
    another prompt's vectors.
    """
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
    worth = [
        [
            group,
            _median([record["dependence"]["ratio"] for record in mine if "dependence" in record], 3),
            _median([_within_tasks(record) for record in mine], 3),
            *(_median([_loss(record, task) for record in mine if task in record], 1) for task in tasks),
        ]
        for (group, method), mine in best.items()
        if method == "parade"
    ]
    tables = [_table(["group", "method", "parameters", "lr", "seeds", "dev loss", *tasks], quality)]
    if worth:
        tables.append(_table(["group", "dependence", "within tasks", *tasks], worth))
    return "\n\n".join(tables)


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
