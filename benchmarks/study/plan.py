# SPDX-License-Identifier: Apache-2.0
"""The groups of each part of the study."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.study.group import Group, Hyperparameters
from benchmarks.study.senders import SENDERS_TASK
from vllm_parade.tuner.model import WIDE

ALL_TASKS = ("sst2", "rte", "boolq", "e2e", "wikisql")
SEEDS = (0, 1, 2)
RATES = {"parade": (5e-3, 1e-2, 2e-2), "lora": (1e-3, 3e-3, 1e-2), "ia3": (1e-2, 3e-2, 1e-1)}
# For parts that compare PARADE with PARADE.
FEW_RATES = (5e-3, 1e-2)
STEPS, SENDERS_STEPS, LONG = 400, 800, 1600
# The mixture's best rates, for longer runs.
LONG_RATES = {"parade": 1e-2, "lora": 3e-3, "ia3": 3e-2}

ATTENTION_INPUT = {"generator_input": "attention_input"}
LAST_TOKEN = {"pooler": "last_token"}


def _standardized(settings: dict[str, Any], own_words: bool = False) -> dict[str, Any]:
    """Options of standardized generators: a wide initialization, and a learning rate of b_up ten times that of W_up.

    Each output depends on r entries of W_up, but on one entry of b_up.
    """
    wide = WIDE[settings.get("pooler", "attentional_capsule")]
    kind = {"settings": settings, "standardized": True, "own_words": own_words}
    return {**kind, "rates": (5e-4, 1e-3, 2e-3), "bias_lr": 10.0, "initial_std": wide}


BEST = _standardized(LAST_TOKEN)
# Conditions that may make vectors depend more on the prompt. Hidden states before the first layer are so small that a
# new generator reads almost nothing (g(z) of 1e-5 before the first norm, on SmolLM2), and the first token's outliers
# dominate the residual stream. So generators start wider, read after the norm, read only the user's words, or are
# standardized.
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
# The paper's Table 6, standardized. PARADE-1 is the condition "standardized, last token".
PAPER_VARIANTS: dict[str, dict[str, Any]] = {
    "PARADE-2": _standardized({**ATTENTION_INPUT, "pooler": "dynamic_routing"}),
    "PARADE-3": _standardized({**ATTENTION_INPUT, "sites": ["q", "k", "v", "gate", "up"], "r": 8}),
    "PARADE-4": _standardized({**ATTENTION_INPUT, "sites": ["q", "v"], "r": 24}),
}
# In addition to r = 12, which is the condition "standardized, last token".
BUDGETS = (3, 6, 24, 48)


def _runs(rates: Sequence[float], **options: float) -> tuple[Hyperparameters, ...]:
    return tuple(Hyperparameters(lr, seed, **options) for lr, seed in product(rates, SEEDS))


def _methods(name: str, tasks: tuple[str, ...], steps: int = STEPS, most: int = 3) -> Iterator[Group]:
    """One group per method, with the first `most` learning rates of the method."""
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
    """A group of PARADE runs."""
    runs = _runs(rates, **options)
    kind = {"own_words": own_words, "standardized": standardized}
    return Group(name, "parade", tasks, runs, settings or {}, steps=steps, **kind)


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
    for name, options in PAPER_VARIANTS.items():
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


# Ordered by importance.
GROUPS = {
    "mixture": _mixture,
    "senders": _senders,
    "long": _long,
    "conditions": _conditions,
    "variants": _variants,
    "budgets": _budgets,
    "tasks": _tasks,
}
