# SPDX-License-Identifier: Apache-2.0
"""What the study runs, and its tables."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.senders import SENDERS_TASK
from benchmarks.stacked import Hyperparameters
from benchmarks.study import Group, Record
from vllm_parade.tuner.model import WIDE

ALL_TASKS = ("sst2", "rte", "boolq", "e2e", "wikisql")
SEEDS = (0, 1, 2)
RATES = {"parade": (5e-3, 1e-2, 2e-2), "lora": (1e-3, 3e-3, 1e-2), "ia3": (1e-2, 3e-2, 1e-1)}
# Of those for which PARADE beside PARADE is compared.
FEW_RATES = (5e-3, 1e-2)
STEPS, SENDERS_STEPS, LONG = 400, 800, 1600
# The best of the mixture's, which run longer.
LONG_RATES = {"parade": 1e-2, "lora": 3e-3, "ia3": 3e-2}

ATTENTION_INPUT = {"generator_input": "attention_input"}
LAST_TOKEN = {"pooler": "last_token"}


def _standardized(settings: dict[str, Any], own_words: bool = False) -> dict[str, Any]:
    """Generators begin wide, and without what all hidden states have in common, which is most of them.

    b_up learns ten times as fast as W_up, of which r entries move an output together.
    """
    wide = WIDE[settings.get("pooler", "attentional_capsule")]
    kind = {"settings": settings, "standardized": True, "own_words": own_words}
    return {**kind, "rates": (5e-4, 1e-3, 2e-3), "bias_lr": 10.0, "initial_std": wide}


STRANGERS = "loss_added_by_strangers_vectors"
BEST = _standardized(LAST_TOKEN)
# What might make the prompt matter. Hidden states that enter the first layer are so small that a new generator reads
# nothing (g(z) of 1e-5 under the first norm, on SmolLM2), and the first token's outliers drown the rest of the residual
# stream: generators begin wider, read after the norm, only the user's own words, or what tells prompts apart.
CONDITIONS: dict[str, dict[str, Any]] = {
    "attention input": {"settings": ATTENTION_INPUT},
    "wide": {"initial_std": 10.0},
    "own words, wide": {"own_words": True, "initial_std": 10.0},
    "attention input, wide": {"settings": ATTENTION_INPUT, "initial_std": 30.0},
    "attention input, own words, wide": {"settings": ATTENTION_INPUT, "own_words": True, "initial_std": 30.0},
    "attention input, wide, bias slow": {"settings": ATTENTION_INPUT, "initial_std": 30.0, "bias_lr": 0.1},
    "attention input, wide, bias fixed": {"settings": ATTENTION_INPUT, "initial_std": 30.0, "bias_lr": 0.0},
    "standardized": _standardized(ATTENTION_INPUT),
    "standardized, own words": _standardized(ATTENTION_INPUT, own_words=True),
    "standardized, last token": _standardized({**LAST_TOKEN, **ATTENTION_INPUT}),
    "standardized, last token, bias not faster": {
        **_standardized({**LAST_TOKEN, **ATTENTION_INPUT}),
        "rates": (2e-3, 5e-3),
        "bias_lr": 1.0,
    },
    "standardized, last token, layer input": BEST,
}
# The paper's Table 6, standardized; PARADE-1 is the last token's condition.
VARIANTS: dict[str, dict[str, Any]] = {
    "PARADE-2": _standardized({**ATTENTION_INPUT, "pooler": "dynamic_routing"}),
    "PARADE-3": _standardized({**ATTENTION_INPUT, "sites": ["q", "k", "v", "gate", "up"], "r": 8}),
    "PARADE-4": _standardized({**ATTENTION_INPUT, "sites": ["q", "v"], "r": 24}),
}
# Beside r=12, which is the last token's condition.
BUDGETS = (3, 6, 24, 48)


def _runs(rates: Sequence[float], **options: float) -> tuple[Hyperparameters, ...]:
    return tuple(Hyperparameters(lr, seed, **options) for lr, seed in product(rates, SEEDS))


def _methods(name: str, tasks: tuple[str, ...], steps: int = STEPS, most: int = 3) -> Iterator[Group]:
    """All methods beside each other, each with its rates, the first `most` of them."""
    for method, rates in RATES.items():
        yield Group(name, method, tasks, _runs(rates[:most]), steps=steps)


def _parade(
    name: str,
    tasks: tuple[str, ...] = ALL_TASKS,
    settings: dict[str, Any] | None = None,
    own_words: bool = False,
    standardized: bool = False,
    steps: int = STEPS,
    rates: Sequence[float] = FEW_RATES,
    **options: float,
) -> Group:
    """A kind of PARADE."""
    runs = _runs(rates, **options)
    kind = {"own_words": own_words, "standardized": standardized}
    return Group(name, "parade", tasks, runs, settings or {}, steps=steps, **kind)


def plan(name: str) -> Iterator[Group]:
    """Groups of a part of the study.

    Raises:
        KeyError: there is no such part.
    """
    yield from PARTS[name]()


def _mixture() -> Iterator[Group]:
    yield from _methods("mixture", ALL_TASKS)


def _conditions() -> Iterator[Group]:
    for name, options in CONDITIONS.items():
        yield _parade(f"conditions/{name}", **options)


def _senders() -> Iterator[Group]:
    tasks = (SENDERS_TASK.name,)
    yield from _methods("senders", tasks, SENDERS_STEPS)
    for name in ("standardized", "standardized, own words", "standardized, last token"):
        yield _parade(f"senders/{name}", tasks, **CONDITIONS[name], steps=SENDERS_STEPS)
        even = {**CONDITIONS[name], "rates": (5e-3,), "bias_lr": 1.0}
        yield _parade(f"senders/{name}, bias not faster", tasks, **even, steps=SENDERS_STEPS)


def _long() -> Iterator[Group]:
    for method, rate in LONG_RATES.items():
        yield Group("long", method, ALL_TASKS, _runs([rate]), steps=LONG)
    yield _parade("long/standardized, last token, layer input", **{**BEST, "rates": (1e-3,)}, steps=LONG)


def _variants() -> Iterator[Group]:
    for name, options in VARIANTS.items():
        yield _parade(f"variants/{name}", **{**options, "rates": (5e-4, 1e-3)})


def _budgets() -> Iterator[Group]:
    for r in BUDGETS:
        settings = {**LAST_TOKEN, **ATTENTION_INPUT, "r": r, "num_capsules": 3 if r % 4 else 4}
        yield _parade(f"budgets/r={r}", **{**BEST, "settings": settings, "rates": (5e-4, 1e-3)})


def _tasks() -> Iterator[Group]:
    for task in ALL_TASKS:
        yield from _methods(f"tasks/{task}", (task,), most=2)
        name = f"tasks/{task}/standardized, last token, layer input"
        yield _parade(name, (task,), **{**BEST, "rates": (5e-4, 1e-3)})


# What matters most comes first.
PARTS = {
    "mixture": _mixture,
    "senders": _senders,
    "long": _long,
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
    behind it the mean over prompts of one task; `strangers` is what the loss gains when every pair gets the vectors of
    another prompt, of another task where there are several, and a task's column is what its metric loses when every
    request gets another prompt's vectors. Adapters of a single task, each with its own metric, stand apart from those
    of several; a column without a value is left out.
    """
    several = [record for record in records if len(record["tasks"]) > 1]
    single = [_single(record) for record in records if len(record["tasks"]) == 1]
    return "\n\n".join(table for some in (several, single) if some for table in _tables(some))


def _single(record: Record) -> Record:
    """The record of an adapter of one task, whose metric is called `metric` whatever the task."""
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
