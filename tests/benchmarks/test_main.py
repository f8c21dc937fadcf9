# SPDX-License-Identifier: Apache-2.0
"""The benchmark command, and a real run of a tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import parser
from benchmarks.samples import TINY
from tests.benchmarks.records import saved, step

ROOT = Path(__file__).parents[2]
COMMANDS = ["run", "parallel", "serve", "kernels", "exactness", "study", "cluster", "show", "plot"]


def test_variants_measured_one_by_one_are_shown_together(tmp_path: Path):
    files = [saved(tmp_path / "a.json", [step("base", 1, 6.0)]), saved(tmp_path / "b.json", [step("parade", 1, 6.3)])]
    text = run_command("show", *map(str, files))
    assert text.count("a card") == 1
    assert "| parade | 6.300 | 1.050 |" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parser().parse_args([command, "--help"])
    assert f"python -m benchmarks {command}" in capsys.readouterr().out


POSITIVE = ("ttft_ms", "tokens_per_s", "beam1_tokens_per_s", "beam3_tokens_per_s", "tables_mib", "seconds", "kernels")


@pytest.mark.engine
@pytest.mark.nightly
def test_run_of_a_tiny_model(tmp_path: Path):
    out = tmp_path / "results.json"
    flags = ["--size", "tiny", "--folder", str(tmp_path), "--adapters", "4", "--slots", "2", "--repeats", "1"]
    flags += ["--kv-cache-gib", "0.25", "--engine", '{"enforce_eager": true, "block_size": 32}', "--out", str(out)]
    plain = ("decode", "prefill", "repeat", "launches", "tenants", "table4")
    text = run_command("run", *plain, "conversations", "whole", "crowd", "documents", "beside", *flags)
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
    assert found >= {
        ("loading", "parade"),
        ("memory", "parade"),
        ("exactness", "base"),
        ("exactness", "tiny_llama_turns"),
    }
    assert found >= {("beside", variant) for variant in variants}
    check_reuse(content["results"])
    for record in content["results"]:
        for name, value in record.items():
            # In a short run, a prefill may take longer than a whole answer, so single step samples mean nothing.
            if name in POSITIVE:
                assert value > 0, record


def check_reuse(results: list[dict[str, Any]]) -> None:
    """Only variants that cannot reuse turns or documents compute them again."""
    computed: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in results:
        if record["workload"] in ("conversations", "documents"):
            point = (record["workload"], record.get("conversations"), record.get("document"))
            computed.setdefault(point, {})[record["variant"]] = record["computed_tokens"]
    prompts = sum(TINY.asked + number * (TINY.asked + TINY.answered) for number in range(TINY.turns))
    for count in (*TINY.conversations, TINY.crowd):
        tokens = computed["conversations", count, None]
        assert tokens["parade"] == tokens["base"] == tokens["lora"] < count * prompts
        assert tokens.get("parade-whole", count * prompts) == count * prompts
    for length in TINY.documents:
        tokens = computed["documents", None, length]
        assert tokens["parade"] == tokens["base"] < tokens["lora"] == length + TINY.question


def run_command(*arguments: str) -> str:
    """Output of a benchmark command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
