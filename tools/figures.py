# SPDX-License-Identifier: Apache-2.0
"""Generates the pages' tables from result files: speed, exactness, routing, the study."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tools.tables import ROOT, table

RESULTS = "benchmarks/results"
STUDY_RESULTS = "benchmarks/study/results"
Record = dict[str, Any]
BATCHES = (1, 32, 256)
# The run of README's table. It measured base model, PARADE and LoRA together.
SPEED_FILE = "llama2-7b-h100.json"
VARIANTS = {"base": "base model", "parade": "PARADE", "lora": "LoRA"}


@lru_cache
def content(folder: str, file: str) -> dict[str, Any]:
    """Content of a result file."""
    found: dict[str, Any] = json.loads((ROOT / folder / file).read_text(encoding="utf-8"))
    return found


def figure(file: str, measure: str, variant: str, **point: Any) -> float | None:
    """A figure of a run; None if the run did not measure it."""
    wanted = {"variant": variant, **point}
    for record in content(RESULTS, file)["results"]:
        if measure in record and all(record.get(name) == value for name, value in wanted.items()):
            return float(record[measure])
    return None


def rounded(value: float) -> str:
    """Round to three digits, or to a whole number from 100."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def speed() -> str:
    """README's table: decode steps of one run."""
    rows = []
    for variant, name in VARIANTS.items():
        cells = []
        for batch in BATCHES:
            point = {"workload": "decode", "batch": batch}
            value, base = (figure(SPEED_FILE, "step_ms", one, **point) for one in (variant, "base"))
            if not value or not base:
                raise ValueError(f"{SPEED_FILE} has no decode step of {variant} with {batch} requests")
            cells.append(rounded(value) + (f" ({value / base:.2f}x)" if variant != "base" else ""))
        rows.append([name, *cells])
    return table(["decode step, ms", *(f"{batch} request{'s' * (batch > 1)}" for batch in BATCHES)], rows)


@dataclass(frozen=True)
class Run:
    """A run on the performance page."""

    file: str
    model: str
    note: str
    hardware: str = ""
    """By default, the card in the result file."""


RUNS = {
    "A": Run(
        "llama2-7b-h200-turns.json",
        "LLaMA-2 7B",
        "Both engines run on one card, measured in turns, so neither gets a warmer card. 256 adapters, 64 slots.",
    ),
    "B": Run(
        SPEED_FILE,
        "LLaMA-2 7B",
        "One engine after the other; the host's second card was busy. 256 adapters, 64 slots; 8 LoRA adapters.",
    ),
    "C": Run(
        "llama2-7b-h200-lora.json",
        "LLaMA-2 7B",
        "Base model and LoRA (8 adapters) in turns. The run was cut off after two points.",
    ),
    "D": Run(
        "llama2-7b-h100-lora-tenants.json",
        "LLaMA-2 7B",
        "The paper's Table 4: one request, 274 tokens in, 32 tokens out. One engine after the other, on a slower host.",
    ),
    "E": Run("llama3-8b-h100.json", "LLaMA-3 8B", "One engine after the other. 256 adapters, 64 slots."),
    "F": Run(
        "llama3-8b-h100-vllm-0.33.json",
        "LLaMA-3 8B",
        "256 adapters, 64 slots. Decode steps of 256 requests are left out, because the client's clock limits them.",
    ),
    "G": Run(
        "llama2-7b-h200-tp2.json",
        "LLaMA-2 7B",
        "`tensor_parallel_size=2`; base model first. First tokens of small batches are left out, because the base "
        "model's engine was shutting down at that time.",
        "2 x NVIDIA H200",
    ),
    "H": Run(
        "llama3-8b-h100-serve.json",
        "LLaMA-3 8B",
        "`vllm serve` under the first 200 requests of the Azure conversation trace, sent three times as fast. "
        "64 adapters, 32 slots; 8 LoRA adapters.",
    ),
}


@dataclass(frozen=True)
class Row:
    """A row of the table, with all points of one measure."""

    run: str
    text: str
    measure: str
    points: tuple[Record, ...]


def _decode(run: str, *batches: int) -> Row:
    text = f"decode step of {_listed(batches)} requests, ms"
    return Row(run, text, "step_ms", tuple({"workload": "decode", "batch": batch} for batch in batches))


def _first(run: str, batch: int, *lengths: int) -> Row:
    who = "a prompt" if batch == 1 else f"{batch} prompts"
    points = tuple({"workload": "prefill", "batch": batch, "length": length} for length in lengths)
    return Row(run, f"first token of {who} of {_listed(lengths)} tokens, ms", "ttft_ms", points)


def _listed(values: Sequence[int]) -> str:
    return " / ".join(map(str, values))


ROWS = (
    _decode("A", *BATCHES),
    _first("A", 1, 274, 600, 8192),
    _first("A", 32, 274),
    _first("A", 256, 274),
    _decode("B", *BATCHES),
    _first("B", 1, 274, 600, 8192),
    _first("B", 256, 274),
    _decode("C", 1, 32),
    Row("D", "tokens/s, greedy", "beam1_tokens_per_s", ({"workload": "table4"},)),
    Row("D", "tokens/s, beam search of size 3", "beam3_tokens_per_s", ({"workload": "table4"},)),
    _decode("E", *BATCHES),
    _first("E", 1, 8192),
    _decode("F", 1, 32),
    _decode("G", *BATCHES),
    _first("G", 256, 274),
    _first("G", 1, 8192),
    Row("H", "output tokens/s", "tokens_per_s", ({"workload": "serve"},)),
    Row("H", "first token, ms (median)", "ttft_ms_p50", ({"workload": "serve"},)),
    Row("H", "each further token, ms (median)", "tpot_ms_p50", ({"workload": "serve"},)),
)


def performance() -> str:
    """Figures of all runs: absolute for the base model, relative to it for PARADE and LoRA."""
    lines = []
    for row in ROWS:
        file = RUNS[row.run].file
        base = [figure(file, row.measure, "base", **point) for point in row.points]
        cells = [" / ".join(rounded(value or 0) for value in base)]
        for variant in ("unused", "parade", "lora"):
            values = [figure(file, row.measure, variant, **point) for point in row.points]
            pairs = [(value, other) for value, other in zip(values, base, strict=True) if value and other]
            cells.append(" / ".join(f"{value / other:.2f}" for value, other in pairs))
        lines.append([row.run, row.text, *cells])
    return table(["run", "measured", "base model", "PARADE unused", "PARADE", "LoRA"], lines)


def runs() -> str:
    """The runs of the performance page: files, hardware, versions and method."""
    lines = []
    for letter, run in RUNS.items():
        machine = content(RESULTS, run.file)["machine"]
        date = f"{machine['date']}, commit {machine['commit'][:7]}"
        link = f"[{letter}](../{RESULTS}/{run.file})"
        lines.append([link, run.model, run.hardware or machine["card"], machine["vllm"], date, run.note])
    return table(["run", "model sizes", "hardware", "vLLM", "date", "how"], lines)


EXACTNESS = (
    "exactness-smollm2-cpu.json",
    "exactness-smollm2-cpu-tp3.json",
    "exactness-smollm2-h100.json",
    "exactness-parallel-h200.json",
    "exactness-tiny-h100-vllm-0.33.json",
)
DEMO_TASKS = {"sst2": "sentiment of a sentence", "e2e": "customer review from facts"}
# The candidate in the results that the repository ships.
DEMO_ADAPTER = "usual, 5e-3, 500 steps"
MODELS = {"SmolLM2-135M-Instruct": "SmolLM2-135M", "tiny_llama": "random, 3 layers"}


def exactness() -> str:
    """Differences between served answers and those of the float32 reference."""
    lines = []
    for file in EXACTNESS:
        machine = content(RESULTS, file)["machine"]
        groups: dict[tuple[str, str, str], list[Record]] = {}
        for record in content(RESULTS, file)["results"]:
            key = record["model"], record.get("layout", "TP=1 PP=1"), record["dtype"]
            groups.setdefault(key, []).append(record)
        for (model, layout, dtype), records in groups.items():
            base = [record for record in records if record["variant"] == "base"]
            others = [record for record in records if record["variant"] != "base"]
            cells = [f"{_sum(some, 'different_tokens')} of {_sum(some, 'tokens')}" for some in (base, others)]
            most = [f"{max(record['max_difference'] for record in some):.0e}" for some in (base, others)]
            card = machine["card"].upper() if machine["card"] == "cpu" else machine["card"]
            link = f"[{card}, vLLM {machine['vllm']}](../{RESULTS}/{file})"
            pairs = [cell for pair in zip(cells, most, strict=True) for cell in pair]
            lines.append([link, layout, MODELS[model], dtype, *pairs])
    head = ["hardware", "layout", "model", "dtype"]
    names = (
        f"{who}: {what}" for who in ("base model", "adapters") for what in ("tokens that differ", "largest difference")
    )
    return table([*head, *names], lines)


def _sum(records: Sequence[Record], name: str) -> int:
    return sum(record[name] for record in records)


def adapters() -> str:
    """Scores of the base model and of the two example adapters, served by vLLM."""
    lines = []
    for record in content(STUDY_RESULTS, "demo-adapters-cpu.json")["results"]:
        if record["split"] == "test":
            name, text = record["task"], DEMO_TASKS[record["task"]]
            scores = [f"{record['scores'][key]:.1f}" for key in ("base model", DEMO_ADAPTER)]
            lines.append([f"`{name}`: {text}", f"{record['metric']}, {record['examples']} prompts", *scores])
    return table(["adapter in `examples/adapters`", "test metric", "base model", "with adapter"], lines)


def routing() -> str:
    """The simulated cluster with the routing rule and with two others."""
    rules = {"affinity": "by adapter", "two choices": "less busy of two", "random": "at random"}
    records = content(RESULTS, "cluster-simulated.json")["results"]
    lines = []
    for share in sorted({record["utilisation"] for record in records}):
        mine = {record["variant"]: record for record in records if record["utilisation"] == share}
        loads = [f"{mine[rule]['load_misses']:.2f}" for rule in rules]
        waits = [f"{mine[rule]['wait_ms_mean']:.0f}" for rule in rules]
        lines.append([f"{share:.0%}", *loads, *waits])
    heads = [f"{what}, {name}" for what in ("loads per request", "mean wait in ms") for name in rules.values()]
    return table(["seats in use", *heads], lines)


@dataclass(frozen=True)
class Method:
    """A row of the study, with the places of its records after 400 and after 1600 steps."""

    name: str
    short: tuple[str, str, str]
    """File, group, method."""
    long: tuple[str, str, str] | None = None


METHODS = (
    Method("(IA)3: one vector for all prompts", ("h200-mixture", "mixture", "ia3"), ("h100-long", "long", "ia3")),
    Method("PARADE, the paper's start", ("h200-mixture", "mixture", "parade"), ("h100-long", "long", "parade")),
    Method("PARADE, standardized", ("h100-standardized", "conditions/standardized", "parade")),
    Method(
        "PARADE, standardized, last token",
        ("h100-standardized", "conditions/standardized, last token, layer input", "parade"),
        ("h100-long", "long/standardized, last token, layer input", "parade"),
    ),
    Method("the same with r = 48", ("h100-budgets", "budgets/r=48", "parade")),
    Method("LoRA, rank 4, seven modules", ("h200-mixture", "mixture", "lora"), ("h100-long", "long", "lora")),
)


def study_records(place: tuple[str, str, str] | None) -> list[Record]:
    """Records of all seeds of a group at its best learning rate."""
    if place is None:
        return []
    from benchmarks.study.tables import best_rate

    file, group, method = place
    records = content(STUDY_RESULTS, f"{file}.json")["results"]
    return best_rate([one for one in records if (one["group"], one["variant"]) == (group, method)])


def study() -> str:
    """Six methods on the mixture of tasks: medians over seeds."""
    lines = []
    for method in METHODS:
        short, long = study_records(method.short), study_records(method.long)
        # The first runs did not measure the dependence over the prompts of all tasks.
        measured = next((some for some in (short, long) if some and "dependence" in some[0]), [])
        spreads = [one["dependence"]["ratio"] for one in measured]
        losses = [f"{statistics.median(one['dev_loss'] for one in some):.3f}" if some else "" for some in (short, long)]
        differ = f"{statistics.median(spreads):.0%}" if spreads else "0%" if method.short[2] == "ia3" else ""
        lines.append([method.name, f"{short[0]['parameters'] / 1e6:.2f} M", *losses, differ])
    head = ["method", "parameters", "dev loss, 400 steps", "dev loss, 1600 steps", "vectors differ between prompts by"]
    return table(head, lines)
