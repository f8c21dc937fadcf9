# SPDX-License-Identifier: Apache-2.0
"""Saves results as JSON with a description of the machine, and prints Markdown tables with ratios to the base model."""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# Key of a record: the tensor-parallel and pipeline-parallel sizes.
LAYOUT = "layout"


@dataclass(frozen=True)
class Columns:
    """Columns of a workload's table."""

    point: tuple[str, ...]
    """Keys that identify a measured point."""
    compared: tuple[str, ...] = ()
    """Measures that get a second column with their ratio to the base model at the same point."""
    others: tuple[str, ...] = ()


TABLES = {
    "exactness": Columns(
        ("model", "dtype"),
        others=("requests", "tokens", "different_tokens", "max_difference", "mean_difference", "mean_effect"),
    ),
    "start": Columns((), others=("seconds",)),
    "loading": Columns(("adapters",), others=("seconds", "ms_per_adapter")),
    "decode": Columns(("batch", "length"), ("step_ms",), ("step_ms_p20", "step_ms_p80", "tokens_per_s")),
    "prefill": Columns(("batch", "length"), ("ttft_ms",), ("ttft_ms_p20", "ttft_ms_p80")),
    "repeat": Columns(("batch", "length"), ("ttft_ms",), ("ttft_ms_p20", "ttft_ms_p80", "first_ms")),
    "tenants": Columns(("adapters", "popularity"), others=("ttft_ms", "ttft_ms_p20", "ttft_ms_p80", "tokens_per_s")),
    "table4": Columns((), ("beam1_tokens_per_s", "beam3_tokens_per_s"), ("beam1_mib", "beam3_mib")),
    "conversations": Columns(
        ("conversations", "turns"),
        ("ttft_sum_ms", "ttft_last_ms", "computed_tokens"),
        ("ttft_sum_ms_p20", "ttft_sum_ms_p80", "rows", "fits_cache"),
    ),
    "documents": Columns(
        ("document", "tenants"), ("first_ms", "ttft_ms"), ("ttft_ms_p20", "ttft_ms_p80", "computed_tokens")
    ),
    "beside": Columns(
        ("running", "prompt", "step_tokens"),
        ("longest_ms", "quiet_ms", "ttft_ms"),
        ("longest_ms_p20", "longest_ms_p80", "step_ms", "steps", "served"),
    ),
    "collectives": Columns(("rank",), ("count",)),
    "launches": Columns(("batch",), ("kernels", "busy_us")),
    "memory": Columns(
        (),
        ("peak_mib", "allocated_mib"),
        ("start_mib", "tables_mib", "slots_mib", "beside_mib", "allocated_beside_mib"),
    ),
    "kernels": Columns(
        ("step", "adapters", "tokens"), others=("layer_us", "model_ms", "model_ms_p20", "model_ms_p80", "launched_ms")
    ),
    "cluster": Columns(
        ("utilisation", "replicas", "adapters"),
        others=(
            "load_misses",
            "wait_ms_mean",
            "wait_ms_p50",
            "wait_ms_p99",
            "most_busy",
            "home",
            "spread",
            "elsewhere",
        ),
    ),
    "serve": Columns(
        ("requests", "speed"),
        ("tokens_per_s", "ttft_ms_p50", "tpot_ms_p50"),
        ("requests_per_s", "ttft_ms_p99", "tpot_ms_p99", "failed"),
    ),
}


def machine() -> Record:
    """Card, versions, commit and date of the results."""
    import vllm_parade

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "card": _card(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "vllm")},
        "vllm_parade": vllm_parade.__version__,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _card() -> str:
    try:
        from vllm.platforms import current_platform
    except ImportError:
        # The study runs without vLLM, and its process uses the device already.
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    # vLLM asks the driver: a process that only starts other processes must not allocate device memory.
    return str(current_platform.get_device_name())


def _version(package: str) -> str | None:
    try:
        return str(getattr(import_module(package), "__version__", None))
    except ImportError:
        return None


def save(path: Path | None, arguments: Record, results: Sequence[Record]) -> None:
    """Write machine, arguments and results to a JSON file; does nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = {name: value for name, value in arguments.items() if name != "function"} | {"out": path.name}
        content = {"machine": machine(), "arguments": shown, "results": list(results)}
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def ratio(record: Record, base: Record | None, measure: str) -> float | None:
    """Ratio of a record's measure to the base model's; None if one of them is missing or zero."""
    value, other = record.get(measure), (base or {}).get(measure)
    return value / other if value and other else None


def with_beside(records: Sequence[Record]) -> list[Record]:
    """Memory records, extended by the memory that a PARADE engine uses beside base engine, tables and slots.

    `beside_mib` compares used device memory, `allocated_beside_mib` tensors only, without an allocator's cached memory.
    """
    base = {record.get(LAYOUT): record for record in records if record["variant"] == "base"}
    return [record | _beside(record, base.get(record.get(LAYOUT), {})) for record in records]


def _beside(record: Record, base: Record) -> Record:
    names = {"peak_mib": "beside_mib", "allocated_mib": "allocated_beside_mib"}
    own = record.get("tables_mib", 0.0) + record.get("slots_mib", 0.0)
    comparable = [name for name in names if own and record.get(name) and base.get(name)]
    return {names[name]: record[name] - base[name] - own for name in comparable}


def table(workload: str, records: Sequence[Record]) -> str:
    """A Markdown table of one workload's records, grouped by measured point."""
    columns = TABLES[workload]
    point = (LAYOUT, *columns.point) if any(LAYOUT in record for record in records) else columns.point
    points: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        points.setdefault(tuple(record.get(key) for key in point), []).append(record)
    compared = [name for measure in columns.compared for name in (measure, "ratio")]
    head = [*point, "variant", *compared, *columns.others]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rows in points.values():
        base = next((record for record in rows if record["variant"] == "base"), None)
        for record in rows:
            cells = [record.get(name) for name in (*point, "variant")]
            for measure in columns.compared:
                cells += [record.get(measure), ratio(record, base, measure)]
            cells += [record.get(measure) for measure in columns.others]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def tables(results: Sequence[Record]) -> str:
    """Tables of all workloads that have results."""
    parts = []
    for workload in TABLES:
        records = [record for record in results if record["workload"] == workload]
        if records:
            records = with_beside(records) if workload == "memory" else records
            parts.append(f"### {workload}\n\n{table(workload, records)}")
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2e}"
