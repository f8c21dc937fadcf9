# SPDX-License-Identifier: Apache-2.0
"""Run variants one after the other on the same machine, print a table, write JSON.

    python -m benchmarks --size llama2-7b --points 1x274,32x274,256x274

Ratios are to the first variant. Compare only figures of one run: another card, another day, another number.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import VARIANTS

MARK = "RESULT "


def measure(variant: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Results of one variant, measured by a process of its own, whose output is passed on."""
    command = [sys.executable, "-m", "benchmarks.measure", variant, *arguments]
    results = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(MARK):
                results.append(json.loads(line.removeprefix(MARK)))
    if process.returncode != 0:
        raise SystemExit(f"benchmarks: {variant} ended with {process.returncode}; its output is above")
    return results


def machine() -> dict[str, Any]:
    """Card, versions and commit that the figures belong to."""
    import torch
    import vllm

    import vllm_parade

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "vllm_parade": vllm_parade.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of the latency points."""
    points = [result for result in results if result["point"] == "latency"]
    base = {(point["batch"], point["length"]): point for point in reversed(points)}
    lines = [
        "| batch | prompt | variant | first token, ms | ratio | decode step, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        first = base[point["batch"], point["length"]]
        ttft, decode = point["ttft_ms"] / first["ttft_ms"], point["decode_ms"] / first["decode_ms"]
        lines.append(
            f"| {point['batch']} | {point['length']} | {point['variant']} | {point['ttft_ms']:.1f} | {ttft:.3f} "
            f"| {point['decode_ms']:.2f} | {decode:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["base", "parade", "lora"], choices=VARIANTS)
    parser.add_argument("--folder", type=Path, required=True, help="where models and adapters are made (20 GB)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, passed_on = parser.parse_known_args()
    results = []
    for variant in args.variants:
        results += measure(variant, ["--folder", str(args.folder), *passed_on])
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "arguments": passed_on, "results": results}, indent=1))


if __name__ == "__main__":
    main()
