# SPDX-License-Identifier: Apache-2.0
"""Tables of made-up results."""

import pytest

from benchmarks.report import table, tables, with_beside
from tests.benchmarks.records import made_up, step

LAYOUTS = [
    ("base", 6.0, "TP=1 PP=1"),
    ("parade", 6.6, "TP=1 PP=1"),
    ("base", 4.0, "TP=2 PP=1"),
    ("parade", 5.0, "TP=2 PP=1"),
]


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_ratios_are_to_the_base_model_at_the_same_point():
    records = [step("base", 1, 6.0), step("base", 256, 24.0), step("parade", 1, 6.3), step("lora", 256, 30.0)]
    head, _, *rows = cells(table("decode", records))
    assert head[:5] == ["batch", "length", "variant", "step_ms", "ratio"]
    # Rows of the same point are adjacent.
    assert [row[:5] for row in rows] == [
        ["1", "274", "base", "6.000", "1.000"],
        ["1", "274", "parade", "6.300", "1.050"],
        ["256", "274", "base", "24.000", "1.000"],
        ["256", "274", "lora", "30.000", "1.250"],
    ]


def test_missing_figures_are_shown_as_missing():
    row = made_up("table4", "lora", beam1_tokens_per_s=10.0, beam3_tokens_per_s=None, beam3_error="no")
    assert cells(table("table4", [row]))[2] == ["lora", "10.000", "-", "-", "-", "-", "-"]
    assert cells(table("decode", [step("parade", 1, 6.0)]))[2][:5] == ["1", "274", "parade", "6.000", "-"]


def test_memory_beside_tables_and_slots():
    own = {"tables_mib": 300.0, "slots_mib": 150.0}
    parade = made_up("memory", "parade", start_mib=1400.0, peak_mib=1500.0, allocated_mib=1370.0, **own)
    base = made_up("memory", "base", start_mib=1000.0, peak_mib=1000.0, allocated_mib=900.0)
    compared = with_beside([base, parade])[1]
    assert compared["beside_mib"] == pytest.approx(50.0)
    assert compared["allocated_beside_mib"] == pytest.approx(20.0)
    # If engines run side by side, the device's memory is that of several engines.
    shared = [{name: value for name, value in record.items() if name != "peak_mib"} for record in (base, parade)]
    assert with_beside(shared)[1] == {**shared[1], "allocated_beside_mib": pytest.approx(20.0)}
    without_gpu = [{**record, "peak_mib": None, "allocated_mib": None} for record in (base, parade)]
    assert with_beside(without_gpu) == without_gpu


def test_layouts_are_compared_with_the_base_model_in_the_same_layout():
    records = [{**step(variant, 1, ms), "layout": layout} for variant, ms, layout in LAYOUTS]
    head, _, *rows = cells(table("decode", records))
    assert head[:6] == ["layout", "batch", "length", "variant", "step_ms", "ratio"]
    assert [(row[0], row[3], row[5]) for row in rows] == [
        ("TP=1 PP=1", "base", "1.000"),
        ("TP=1 PP=1", "parade", "1.100"),
        ("TP=2 PP=1", "base", "1.000"),
        ("TP=2 PP=1", "parade", "1.250"),
    ]


def test_tables_of_every_workload_in_a_file():
    text = tables([step("base", 1, 6.0), made_up("loading", "parade", adapters=3, seconds=0.3, ms_per_adapter=100.0)])
    assert "### decode" in text
    assert "### loading" in text
    assert "### prefill" not in text
