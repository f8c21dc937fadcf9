# SPDX-License-Identifier: Apache-2.0
"""Draws pictures from the JSON files of `python -m benchmarks run`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Record

LABELS = {"base": "base model", "parade": "PARADE, one adapter per request", "lora": "LoRA, 8 adapters"}
COLOURS = {"base": "#7f7f7f", "parade": "#1f77b4", "lora": "#e6842a"}
POPULARITIES = {"uniform": "uniform popularity", "zipf": "popularity by Zipf's law"}
RULE_COLOURS = {"affinity": "#1f77b4", "two choices": "#7f7f7f", "random": "#c44e52"}
BAR_WIDTH = 0.26


def pictures(files: Sequence[Path], folder: Path) -> list[Path]:
    """Draw pictures of the files' results, one set per model size and card; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    merged: dict[tuple[str, str], list[Record]] = {}
    for content in (json.loads(file.read_text()) for file in files):
        key = (content["arguments"].get("size", "model"), content["machine"]["card"])
        merged.setdefault(key, []).extend(content["results"])
    paths = []
    for (size, card), results in merged.items():
        for name, draw in (("decode", draw_decode), ("tenants", draw_tenants), ("cluster", draw_cluster)):
            records = [record for record in results if record["workload"] == name]
            if records:
                path = folder / f"{name}_{size}_{card.replace(' ', '_')}.png"
                draw(records, "a simulated cluster" if name == "cluster" else f"{size}, bfloat16, {card}", path)
                paths.append(path)
    return paths


def draw_decode(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw bars: time of a decode step by batch size and variant."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    batches = sorted({record["batch"] for record in records})
    variants = [name for name in LABELS if any(record["variant"] == name for record in records)]
    for place, name in enumerate(variants):
        mine = {record["batch"]: record for record in records if record["variant"] == name}
        shift = (place - (len(variants) - 1) / 2) * BAR_WIDTH
        at = [number + shift for number, batch in enumerate(batches) if batch in mine]
        steps = [mine[batch]["step_ms"] for batch in batches if batch in mine]
        bars = axes.bar(at, steps, BAR_WIDTH * 0.92, label=LABELS[name], color=COLOURS[name])
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel(f"requests in the batch, prompts of {records[0]['length']} tokens")
    axes.set_ylabel("ms per decode step")
    _finish(figure, [axes], title, path)


def draw_tenants(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw lines: throughput, and time to first token of single requests, by number of adapters."""
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    measures = {"tokens_per_s": "output tokens per second", "ttft_ms": "ms to first token, one request at a time"}
    for axes, (measure, label) in zip(every, measures.items(), strict=True):
        for variant, popularity, curve in _curves(records):
            name = LABELS[variant].split(",")[0]
            axes.plot(
                [record["adapters"] for record in curve],
                [record[measure] for record in curve],
                "-" if popularity == "uniform" else "--",
                marker="o",
                markersize=4,
                color=COLOURS[variant],
                label=f"{name}, {POPULARITIES[popularity]}",
            )
        for record in (record for record in records if record["variant"] == "base"):
            axes.axhline(record[measure], color=COLOURS["base"], linewidth=1, label=LABELS["base"])
        axes.set_xscale("log")
        counts = sorted({record["adapters"] for record in records if record["adapters"]})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(0, 1.2 * max(record[measure] for record in records))
        axes.set_xlabel("adapters")
        axes.set_ylabel(label)
    _finish(figure, list(every), title, path)


def draw_cluster(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw bars: adapter loads and waiting time by utilisation and routing rule."""
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shares = sorted({record["utilisation"] for record in records})
    measures = {
        "load_misses": ("adapter loads per request", "%.2f"),
        "wait_ms_mean": ("mean wait, ms, loads included", "%.0f"),
    }
    for axes, (measure, (label, figures)) in zip(every, measures.items(), strict=True):
        for place, (name, colour) in enumerate(zip(RULE_COLOURS, RULE_COLOURS.values(), strict=True)):
            mine = {record["utilisation"]: record[measure] for record in records if record["variant"] == name}
            at = [number + (place - 1) * BAR_WIDTH for number in range(len(shares))]
            bars = axes.bar(at, [mine[share] for share in shares], BAR_WIDTH * 0.92, label=name, color=colour)
            axes.bar_label(bars, fmt=figures, fontsize=8, padding=2)
        axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axes.set_xlabel(f"utilisation; {records[0]['replicas']} replicas, {records[0]['adapters']} adapters")
        axes.set_ylabel(label)
    _finish(figure, list(every)[::-1], title, path)


def _curves(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Yield variant, popularity, and records sorted by number of adapters. One adapter counts for both popularities."""
    for variant in ("parade", "lora"):
        for popularity in POPULARITIES:
            mine = [record for record in records if record["variant"] == variant]
            curve = [record for record in mine if record["popularity"] == popularity or record["adapters"] == 1]
            if curve:
                yield variant, popularity, sorted(curve, key=lambda record: record["adapters"])


def _finish(figure: Any, every: Sequence[Any], title: str, path: Path) -> None:
    from matplotlib import pyplot

    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    every[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
