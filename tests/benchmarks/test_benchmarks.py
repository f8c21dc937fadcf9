"""The benchmark command: its tables and pictures on made-up results, its adapters, and a real run of a tiny model."""

import importlib.util
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from benchmarks.cluster import RULES
from benchmarks.engine import Turn
from benchmarks.exactness import BFLOAT16_BOUND, bfloat16_ratios, failures
from benchmarks.measure import END, MARK, STARTED, results_of
from benchmarks.models import SIZES, make_model, make_parades
from benchmarks.report import table, tables, with_beside
from benchmarks.serve import MAX_PROMPT, write_replay
from benchmarks.workloads import drawn, spread
from vllm_parade.adapter import BaseModelShape, load_adapter

ROOT = Path(__file__).parents[2]
SHAPE = BaseModelShape(8, 1, {"q": 8, "k": 4, "v": 4, "gate": 16, "up": 16})
LAYOUTS = [
    ("base", 6.0, "TP=1 PP=1"),
    ("parade", 6.6, "TP=1 PP=1"),
    ("base", 4.0, "TP=2 PP=1"),
    ("parade", 5.0, "TP=2 PP=1"),
]
COMMANDS = ["run", "parallel", "serve", "kernels", "exactness", "study", "cluster", "show", "plot"]


def made_up(workload: str, variant: str, **values: Any) -> dict[str, Any]:
    return {"workload": workload, "variant": variant, **values}


def step(variant: str, batch: int, milliseconds: float) -> dict[str, Any]:
    return made_up("decode", variant, batch=batch, length=274, step_ms=milliseconds)


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_ratios_are_to_the_base_model_at_the_same_point():
    records = [step("base", 1, 6.0), step("base", 256, 24.0), step("parade", 1, 6.3), step("lora", 256, 30.0)]
    head, _, *rows = cells(table("decode", records))
    assert head[:5] == ["batch", "length", "variant", "step_ms", "ratio"]
    # What belongs to one point stands together.
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
    # Side by side, the device's memory belongs to several engines.
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


def test_spread_is_in_milliseconds():
    figures = spread([0.005, 0.001, 0.003, 0.002, 0.004, 0.006], "ttft")
    assert figures["ttft_ms"] == pytest.approx(3.5)
    assert figures["ttft_ms_p20"] == pytest.approx(2.0)
    assert figures["ttft_ms_p80"] == pytest.approx(5.0)
    assert figures["ttft_ms_all"] == [1, 2, 3, 4, 5, 6]
    assert spread([0.002], "ttft")["ttft_ms_p80"] == pytest.approx(2.0)


def test_popularity():
    names = [str(number) for number in range(100)]
    uniform, zipf = drawn(names, 2000, "uniform"), drawn(names, 2000, "zipf")
    assert uniform.count("0") < 50 < 300 < zipf.count("0")
    assert len(set(uniform)) == 100
    assert drawn(names, 5, "zipf") == drawn(names, 5, "zipf")
    assert drawn([], 5, "uniform") == []


def test_whoever_measures_side_by_side_waits_for_a_turn(tmp_path: Path):
    turns, order = [Turn(str(tmp_path / "turns")) for _ in range(2)], []

    def measure(number: int) -> None:
        for _ in range(3):
            with turns[number](), turns[number]():
                order.append(number)
                time.sleep(0.02)
                order.append(number)

    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(measure, range(2)))
    assert order in ([0, 0, 1, 1] * 3, [1, 1, 0, 0] * 3)
    with Turn("")():
        pass


def test_nobody_waits_for_an_engine_that_did_not_start():
    waits = f"print({STARTED!r}, flush=True); input(); print({MARK!r} + '{{}}'); print({END!r})"

    def results(codes: list[str]) -> list[Any]:
        together = Barrier(len(codes))
        with ThreadPoolExecutor(len(codes)) as pool:
            commands = [[sys.executable, "-c", code] for code in codes]
            return [pool.submit(results_of, command, together) for command in commands]

    assert [one.result() for one in results([waits, waits])] == [[{}], [{}]]
    broken, ended = results([waits, "pass"])
    with pytest.raises(BrokenBarrierError):
        broken.result()
    with pytest.raises(SystemExit, match="ended early"):
        ended.result()


def exact(variant: str, dtype: str, different: int, difference: float) -> dict[str, Any]:
    figures = {"max_difference": difference, "mean_difference": difference / 10, "mean_effect": 0.1}
    return made_up("exactness", variant, dtype=dtype, model="m", tokens=9, different_tokens=different, **figures)


def test_gate():
    assert not failures([exact("base", "float32", 0, 1e-4), exact("a", "float32", 0, 9e-4)])
    assert "float32, m, a: 1 of 9" in failures([exact("a", "float32", 1, 1e-4)])[0]
    assert len(failures([exact("a", "float32", 0, 2e-3)])) == 1
    assert "too little" in failures([{**exact("a", "float32", 0, 1e-4), "mean_effect": 1e-3}])[0]
    # Rounding to bfloat16 changes tokens of the base model too.
    rows = [exact("base", "bfloat16", 3, 0.1), exact("a", "bfloat16", 3, 0.12)]
    assert not failures(rows)
    assert bfloat16_ratios(rows)["a"]["max_difference"] == pytest.approx(1.2)
    assert len(failures([rows[0], exact("b", "bfloat16", 0, 0.11 * BFLOAT16_BOUND)])) == 2


def test_made_adapters_differ_in_content_and_stay(tmp_path: Path):
    paths = make_parades(tmp_path, SHAPE, 5)
    assert len({load_adapter(path, SHAPE, max_rank=12, sites=("q", "v", "up")).content_hash for path in paths}) == 5
    before = (Path(paths[2]) / "adapter_model.safetensors").stat().st_mtime_ns
    assert make_parades(tmp_path, SHAPE, 3) == paths[:3]
    assert (Path(paths[2]) / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_model_has_a_tokenizer(tmp_path: Path):
    from transformers import AutoTokenizer

    make_model(tmp_path, "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = random.Random(0).sample(range(3, SIZES["tiny"]["vocab_size"]), 20)
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids
    assert tokenizer.eos_token_id == 2


def test_trace_is_replayed_with_its_lengths_and_arrivals(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,14050,0\n"
        "2023-11-16 18:15:51.2224670,879,55\n"
    )
    assert write_replay(trace, tmp_path / "replay.jsonl", 2, 2.0, "llama2-7b") == 2
    first, second = map(json.loads, (tmp_path / "replay.jsonl").read_text().splitlines())
    assert first == {"timestamp": 0.0, "input_length": 374, "output_length": 44, "hash_ids": [0]}
    assert second == {"timestamp": 2.0, "input_length": MAX_PROMPT, "output_length": 1, "hash_ids": [1]}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_pictures(tmp_path: Path):
    from benchmarks.plot import pictures

    crowd = [
        made_up("tenants", variant, adapters=count, popularity=popularity, tokens_per_s=100.0, ttft_ms=9.0)
        for variant, counts in (("parade", (1, 8, 64)), ("lora", (1, 8)))
        for count in counts
        for popularity in (("uniform", "zipf") if count > 1 else ("uniform",))
    ]
    alone = made_up("tenants", "base", adapters=0, popularity="uniform", tokens_per_s=120.0, ttft_ms=8.0)
    bars = [step(variant, batch, 6.0 + batch / 10) for variant in ("base", "unused", "parade") for batch in (1, 32)]
    rules = [
        made_up("cluster", name, utilisation=0.5, replicas=9, adapters=99, load_misses=0.1, wait_ms_mean=3.0)
        for name in RULES
    ]
    files = [saved(tmp_path / "a.json", bars), saved(tmp_path / "b.json", [*crowd, alone, *rules])]
    paths = pictures(files, tmp_path / "pictures")
    assert [path.name for path in paths] == [
        "decode_tiny_a_card.png",
        "tenants_tiny_a_card.png",
        "cluster_tiny_a_card.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in paths)


def saved(path: Path, results: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"machine": {"card": "a card"}, "arguments": {"size": "tiny"}, "results": results}))
    return path


def test_variants_measured_one_by_one_are_shown_together(tmp_path: Path):
    files = [saved(tmp_path / "a.json", [step("base", 1, 6.0)]), saved(tmp_path / "b.json", [step("parade", 1, 6.3)])]
    text = run_command("show", *map(str, files))
    assert text.count("a card") == 1
    assert "| parade | 6.300 | 1.050 |" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str):
    text = run_command(command, "--help")
    assert f"python -m benchmarks {command}" in text


POSITIVE = ("ttft_ms", "tokens_per_s", "beam1_tokens_per_s", "beam3_tokens_per_s", "tables_mib", "seconds", "kernels")


@pytest.mark.engine
@pytest.mark.slow
def test_run_of_a_tiny_model(tmp_path: Path):
    out = tmp_path / "results.json"
    flags = ["--size", "tiny", "--folder", str(tmp_path), "--adapters", "4", "--slots", "2", "--repeats", "1"]
    flags += ["--kv-cache-gib", "0.25", "--engine", '{"enforce_eager": true}', "--out", str(out)]
    text = run_command("run", "decode", "prefill", "repeat", "launches", "tenants", "table4", *flags)
    assert "### table4" in text
    content = json.loads(out.read_text())
    assert {"card", "torch", "vllm", "vllm_parade", "triton", "commit", "date"} <= set(content["machine"])
    found = {(record["workload"], record["variant"]) for record in content["results"]}
    variants = {"base", "unused", "parade", "lora"}
    assert found >= {
        (workload, variant) for workload in ("decode", "prefill", "repeat", "launches") for variant in variants
    }
    assert found >= {("table4", variant) for variant in ("base", "parade", "ia3", "lora")}
    assert found >= {("tenants", variant) for variant in ("base", "parade", "lora")}
    assert found >= {("loading", "parade"), ("memory", "parade"), ("exactness", "base")}
    for record in content["results"]:
        for name, value in record.items():
            # A short run's prefill may outlast the whole answer's, so single samples of a step mean nothing.
            if name in POSITIVE:
                assert value > 0, record


def run_command(*arguments: str) -> str:
    """Output of a benchmark command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
