# SPDX-License-Identifier: Apache-2.0
"""The study's tables of made-up records."""

from typing import Any

from benchmarks.study.tables import best_rate, study_tables


def record(lr: float, seed: int, dev_loss: float, **values: Any) -> dict[str, Any]:
    swapped = {"sst2_swapped": values["sst2"] - 5, "sst2_dependence": {"ratio": lr}, "dependence": {"ratio": 2 * lr}}
    group = {"group": "g", "variant": "parade", "tasks": ["sst2"], "parameters": 1234}
    return {**group, "lr": lr, "seed": seed, "dev_loss": dev_loss, **swapped, **values}


def test_tables_take_the_rate_of_the_lowest_median_dev_loss() -> None:
    # One lucky seed does not make a rate the best.
    slow = [record(1e-3, seed, loss, sst2=80.0 + seed) for seed, loss in enumerate((0.5, 0.4, 0.6))]
    fast = [record(1e-2, seed, loss, sst2=50.0) for seed, loss in enumerate((0.1, 0.9, 0.9))]
    assert best_rate(slow + fast) == slow
    quality, worth = (table.splitlines() for table in study_tables(slow + fast).split("\n\n"))
    assert quality[0].endswith("| dev loss | metric |")
    assert quality[2] == "| g | parade | 1,234 | 0.001 | 3 | 0.500 (0.400 to 0.600) | 81.0 (80.0 to 82.0) |"
    # Strangers' vectors were not measured, so the table has no column for them.
    assert worth[0] == "| group | dependence | metric |"
    assert worth[2] == "| g | 0.002 (0.002 to 0.002) | 5.0 (5.0 to 5.0) |"


def test_adapters_of_several_tasks_stand_apart() -> None:
    tasks = {"tasks": ["sst2", "rte"], "rte": 60.0, "rte_swapped": 59.0, "rte_dependence": {"ratio": 0.5}}
    strangers = {"loss_added_by_strangers_vectors": 0.25}
    mixed = record(0.1, 0, 0.5, sst2=80.0, **tasks, **strangers) | {"group": "mixed"}
    alone = record(0.1, 0, 0.4, sst2=90.0)
    tables = [table.splitlines() for table in study_tables([alone, mixed]).split("\n\n")]
    assert [table[0] for table in tables] == [
        "| group | method | parameters | lr | seeds | dev loss | sst2 | rte |",
        "| group | dependence | within tasks | strangers | sst2 | rte |",
        "| group | method | parameters | lr | seeds | dev loss | metric |",
        "| group | dependence | metric |",
    ]
    ranges = ("0.200 (0.200 to 0.200)", "0.300 (0.300 to 0.300)", "0.250 (0.250 to 0.250)", "5.0 (5.0 to 5.0)")
    assert tables[1][2] == f"| mixed | {' | '.join(ranges)} | 1.0 (1.0 to 1.0) |"
    assert [table[-1].split(" | ")[0] for table in tables] == ["| mixed", "| mixed", "| g", "| g"]
