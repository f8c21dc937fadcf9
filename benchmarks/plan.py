# SPDX-License-Identifier: Apache-2.0
"""What the study runs, and its tables."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.stacked import Hyperparameters
from benchmarks.study import Group, Record

ALL_TASKS = ("sst2", "rte", "boolq", "e2e", "wikisql")
SEEDS = (0, 1, 2)
RATES = {"parade": (2e-3, 5e-3, 1e-2), "lora": (5e-4, 1e-3, 3e-3), "ia3": (5e-3, 1e-2, 3e-2)}
# The paper's Table 6 beside PARADE itself, which is the mixture's.
VARIANTS: dict[str, dict[str, Any]] = {
    "PARADE-1": {"pooler": "last_token"},
    "PARADE-2": {"pooler": "dynamic_routing"},
    "PARADE-3": {"sites": ["q", "k", "v", "gate", "up"], "r": 8},
    "PARADE-4": {"sites": ["q", "v"], "r": 24},
}
# Beside r=12, which is the mixture's.
BUDGETS = (3, 6, 24, 48)
# Ways to make the prompt matter: options of a group, and of its runs. At the usual initial scale the pooler's squash
# leaves almost nothing of what it read (g(z) of 1e-5 under the first norm, on SmolLM2), and the first token's outliers
# drown the rest of the residual stream: generators begin wider, read after the norm, or only the user's own words.
ATTENTION_INPUT = {"generator_input": "attention_input"}
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "attention input": ({"settings": ATTENTION_INPUT}, {}),
    "wide": ({}, {"initial_std": 10.0}),
    "own words, wide": ({"own_words": True}, {"initial_std": 10.0}),
    "attention input, wide": ({"settings": ATTENTION_INPUT}, {"initial_std": 30.0}),
    "attention input, own words, wide": ({"settings": ATTENTION_INPUT, "own_words": True}, {"initial_std": 30.0}),
    "attention input, wide, bias slow": ({"settings": ATTENTION_INPUT}, {"initial_std": 30.0, "bias_lr": 0.1}),
    "attention input, wide, bias fixed": ({"settings": ATTENTION_INPUT}, {"initial_std": 30.0, "bias_lr": 0.0}),
}


def _runs(method: str, **options: float) -> tuple[Hyperparameters, ...]:
    return tuple(Hyperparameters(lr, seed, **options) for lr, seed in product(RATES[method], SEEDS))


def plan(name: str) -> Iterator[Group]:
    """Groups of a part of the study.

    Raises:
        KeyError: there is no such part.
    """
    yield from PARTS[name]()


def _tasks() -> Iterator[Group]:
    for task, method in product(ALL_TASKS, RATES):
        yield Group(f"tasks/{task}", method, (task,), _runs(method))


def _mixture() -> Iterator[Group]:
    for method in RATES:
        yield Group("mixture", method, ALL_TASKS, _runs(method))


def _conditions() -> Iterator[Group]:
    for name, (options, of_runs) in CONDITIONS.items():
        yield Group(f"conditions/{name}", "parade", ALL_TASKS, _runs("parade", **of_runs), **options)


def _variants() -> Iterator[Group]:
    for name, settings in VARIANTS.items():
        yield Group(f"variants/{name}", "parade", ALL_TASKS, _runs("parade"), settings)


def _budgets() -> Iterator[Group]:
    for r in BUDGETS:
        settings = {"r": r, "num_capsules": 3 if r % 4 else 4}
        yield Group(f"budgets/r={r}", "parade", ALL_TASKS, _runs("parade"), settings)


# What matters most comes first.
PARTS = {
    "mixture": _mixture,
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


def study_table(records: Sequence[Record]) -> str:
    """A line for every group and method: medians over seeds at its best learning rate, and their range."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["group"], record["variant"]), []).append(record)
    tasks = sorted({task for record in records for task in record["tasks"]})
    head = ["group", "method", "parameters", "lr", "seeds", "dev loss"]
    head += [column for task in tasks for column in (task, f"{task} swapped", f"{task} dependence")]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (group, method), mine in groups.items():
        best = best_rate(mine)
        cells = [group, method, f"{best[0]['parameters']:,}", f"{best[0]['lr']:g}", str(len(best))]
        cells.append(_median([record["dev_loss"] for record in best], 3))
        for task in tasks:
            cells.append(_median([record[task] for record in best if task in record], 1))
            cells.append(_median([record[f"{task}_swapped"] for record in best if f"{task}_swapped" in record], 1))
            found = [record[f"{task}_dependence"]["ratio"] for record in best if f"{task}_dependence" in record]
            cells.append(_median(found, 3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
