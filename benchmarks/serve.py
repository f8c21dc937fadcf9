# SPDX-License-Identifier: Apache-2.0
"""Measures servers under recorded traffic: `vllm serve` with dummy weights, driven by `vllm bench serve`.

Lengths and arrival times come from the trace. Prompts are random tokens, the same for all variants.
"""

import csv
import json
import os
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.engine import NUM_LORAS, Settings
from benchmarks.measure import prepare_environment
from benchmarks.models import make_loras, make_model, make_parades
from testing.server import VLLM, server

# PARADE reads a prompt in one step, so prompts are cut to vLLM's default for tokens per step on large cards.
MAX_PROMPT = 8192
MAX_ANSWER = 512


def measure_server(settings: Settings, trace: Path, requests: int, speed: float) -> list[dict[str, Any]]:
    """Records of one server under the trace with its adapters; of a PARADE server, also with the base model only."""
    prepare_environment()
    folder = Path(settings.folder) / settings.size
    shape = make_model(folder, settings.size)
    replay = folder / "trace.jsonl"
    requests = write_replay(trace, replay, requests, speed, settings.size)
    flags, names = [], []
    if settings.variant == "parade":
        paths = make_parades(folder, shape, settings.adapters)
        names = [f"p{number}" for number in range(len(paths))]
        modules = [f"{name}={path}" for name, path in zip(names, paths, strict=True)]
        flags = ["--enable-parade", "--max-parades", str(settings.slots), "--parade-modules", *modules]
        flags += ["--max-cpu-parades", str(max(settings.slots, len(paths)))]
    elif settings.variant == "lora":
        paths = make_loras(folder, shape, NUM_LORAS)
        names = [f"l{number}" for number in range(len(paths))]
        modules = [f"{name}={path}" for name, path in zip(names, paths, strict=True)]
        flags = ["--enable-lora", "--max-loras", str(NUM_LORAS), "--max-lora-rank", "8", "--lora-modules", *modules]
    users = {"unused": [], "parade": names} if settings.variant == "parade" else {settings.variant: names}
    with server(str(folder), *common_flags(settings), *flags, log=folder / f"serve_{settings.variant}.log") as url:
        # Warm-up: a server's first requests compile kernels.
        bench(url, folder, replay, min(requests, 16), names)
        return [
            {"workload": "serve", "variant": name, "speed": speed, **bench(url, folder, replay, requests, used)}
            for name, used in users.items()
        ]


def write_replay(trace: Path, replay: Path, requests: int, speed: float, size: str) -> int:
    """Write the first requests of a trace in the format of `vllm bench serve`; returns their number."""
    with trace.open(newline="") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(requests), strict=False)]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    # A tiny model is for quick runs, with short prompts and answers.
    longest, answer = (64, 8) if size == "tiny" else (MAX_PROMPT, MAX_ANSWER)
    with replay.open("w") as file:
        for number, (row, arrival) in enumerate(zip(rows, times, strict=True)):
            entry = {
                "timestamp": (arrival - times[0]).total_seconds() / speed,
                "input_length": max(1, min(int(row["ContextTokens"]), longest)),
                "output_length": max(1, min(int(row["GeneratedTokens"]), answer)),
                # A unique chunk of the prompt's length, so that no prompt hits the prefix cache.
                "hash_ids": [number],
            }
            file.write(json.dumps(entry) + "\n")
    return len(rows)


def common_flags(settings: Settings) -> list[str]:
    """Flags that all variants share, including the arguments of the offline engines."""
    flags = ["--max-num-batched-tokens", str(MAX_PROMPT), "--served-model-name", "base"]
    for name, value in settings.engine_arguments().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return flags


def bench(url: str, tokenizer: Path, replay: Path, requests: int, names: list[str]) -> dict[str, Any]:
    """Run `vllm bench serve` on a server; returns its figures."""
    result = replay.with_name("bench_result.json")
    command = [VLLM, "bench", "serve", "--base-url", url, "--model", "base", "--tokenizer", str(tokenizer)]
    command += ["--dataset-name", "timed_trace", "--dataset-path", str(replay), "--num-prompts", str(requests)]
    command += ["--timed-trace-chunk-hash-size", str(2 * MAX_PROMPT), "--temperature", "0", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99", "--save-result"]
    command += ["--result-dir", str(result.parent), "--result-filename", result.name]
    command += ["--lora-modules", *names] if names else []
    # The client derives prompts from hash(); a fixed seed gives the same prompts in every run.
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, stdout=subprocess.DEVNULL, check=True)
    figures = json.loads(result.read_text())
    return {
        "requests": figures["completed"],
        "failed": requests - figures["completed"],
        "requests_per_s": figures["request_throughput"],
        "tokens_per_s": figures["output_throughput"],
        **{f"{name}_ms_p{p}": figures[f"p{p}_{name}_ms"] for name in ("ttft", "tpot") for p in (50, 99)},
    }
