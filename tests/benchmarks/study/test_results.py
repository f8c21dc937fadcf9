# SPDX-License-Identifier: Apache-2.0
"""The documented figures of the study are those of its result files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.tables import study_tables

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks/study/results"
TABLES = ROOT / "benchmarks/study/TABLES.md"
# The chosen candidate, by its name in the results.
CHOSEN = "usual, 5e-3, 500 steps"
SENDERS_RESULTS = ("h100-senders", "h100-senders-first")
MIXTURE_RESULTS = ("h200-mixture", "h200-conditions", "h100-rates", "h100-standardized", "h100-long", "h100-budgets")
LATER_RESULTS = ("h200-variants-tasks", "h200-tasks-strangers")


@pytest.mark.parametrize("names", [MIXTURE_RESULTS, LATER_RESULTS, SENDERS_RESULTS, ("h200-least-deviation",)])
def test_the_documented_tables_are_those_of_the_results(names: tuple[str, ...]) -> None:
    results = [f"{name}.json" for name in names]
    records = [record for file in results for record in json.loads((RESULTS / file).read_text())["results"]]
    text = TABLES.read_text()
    assert all(file in text for file in results)
    for table in study_tables(records).split("\n\n"):
        assert table in text


def demo_table(results: dict[str, Any]) -> str:
    """The demo's adapters and the other candidates: task, adapter, dev loss, dev metric, test metric."""
    scores = {(record["task"], record["split"]): record["scores"] for record in results["results"]}
    trained = {(record["task"], record["adapter"]): record for record in results["trainer"]}
    lines = []
    for task in ("sst2", "e2e"):
        for name, score in scores[task, "test"].items():
            trainer = trained.get((task, name), {"dev_loss": "", "dev_metric_of_100": None})
            dev = scores.get((task, "dev"), {}).get(name, trainer["dev_metric_of_100"])
            shown = "" if dev is None else f"{dev:.1f}"
            lines.append(f"| {task} | {name} | {trainer['dev_loss']} | {shown} | {score:.1f} |")
    return "\n".join(lines)


def test_the_demos_figures_are_those_of_the_results() -> None:
    results = json.loads((RESULTS / "demo-adapters-cpu.json").read_text())
    assert demo_table(results) in TABLES.read_text()
    for record in (record for record in results["results"] if record["split"] == "test"):
        task, base, chosen = record["task"], record["scores"]["base model"], record["scores"][CHOSEN]
        card = " ".join((ROOT / f"examples/adapters/{task}/README.md").read_text().split())
        assert f": {chosen:.1f}, base model {base:.1f}." in card
