# SPDX-License-Identifier: Apache-2.0
"""Measure PARADE, LoRA and the base model on this machine.

    python -m benchmarks run decode prefill --size llama2-7b --folder /tmp/bench --out results.json
    python -m benchmarks plot results.json --out pictures

Compare figures of one run only: they differ between cards and between days.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

from benchmarks.engine import VARIANTS, Settings
from benchmarks.models import SIZES
from benchmarks.report import Record
from benchmarks.study.command import add_flags, study
from benchmarks.workloads import WORKLOADS


def run(args: argparse.Namespace) -> None:
    """Measure offline engines."""
    from benchmarks.measure import measure

    def measure_workloads(settings: Settings, together: Barrier | None) -> list[Record]:
        return measure(replace(settings, workloads=args.workloads, repeats=args.repeats), together)

    _variants(args, measure_workloads, args.side_by_side)


def parallel(args: argparse.Namespace) -> None:
    """Measure offline engines on several GPUs."""
    from benchmarks.measure import measure
    from benchmarks.report import LAYOUT

    def measure_layouts(settings: Settings, together: Barrier | None) -> list[Record]:
        results = []
        for tensor, pipeline in args.layouts:
            sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
            engine = {**settings.engine, **sizes}
            chosen = replace(settings, engine=engine, workloads=args.workloads, repeats=args.repeats)
            results += [{LAYOUT: f"TP={tensor} PP={pipeline}", **record} for record in measure(chosen, together)]
        return results

    _variants(args, measure_layouts, args.side_by_side)


def serve(args: argparse.Namespace) -> None:
    """Measure servers under recorded traffic."""
    from benchmarks.serve import measure_server
    from testing.server import ServerError

    try:
        _variants(args, lambda settings, _: measure_server(settings, args.trace, args.requests, args.speed))
    except ServerError as error:
        raise SystemExit(f"benchmarks: {error}") from error


def _variants(
    args: argparse.Namespace,
    measure: Callable[[Settings, Barrier | None], list[Record]],
    side_by_side: bool = False,
) -> None:
    """Run the exactness gate, then measure the variants one by one or side by side. Results are saved after each."""
    from benchmarks.report import save, tables

    args.folder.mkdir(parents=True, exist_ok=True)
    results = []
    if not args.skip_gate:
        from benchmarks.exactness import gate

        results += gate(args.folder, args.engine)
    settings = [
        Settings(
            variant=variant,
            size=args.size,
            folder=str(args.folder),
            adapters=args.adapters,
            slots=args.slots,
            kv_cache_gib=args.kv_cache_gib,
            engine=args.engine,
        )
        for variant in args.variants
    ]
    together = None
    if side_by_side:
        # The KV cache has a fixed size, so vLLM uses this only to check the free memory.
        engine = {"gpu_memory_utilization": 0.9 / len(settings), **args.engine}
        settings = [replace(each, engine=engine, turns=str(args.folder / "turns")) for each in settings]
        together = Barrier(len(settings))
    with ThreadPoolExecutor(len(settings) if side_by_side else 1) as pool:
        for found in pool.map(lambda each: measure(each, together), settings):
            results += found
            save(args.out, vars(args), results)
    print(tables(results))


def kernels(args: argparse.Namespace) -> None:
    """Measure the generator's kernels alone."""
    from benchmarks.kernels import measure_kernels
    from benchmarks.report import save, tables

    results = measure_kernels(args.size, args.repeats)
    save(args.out, vars(args), results)
    print(tables(results))


def exactness(args: argparse.Namespace) -> None:
    """Compare answers with the float32 reference."""
    from benchmarks.exactness import main

    main(args)


def cluster(args: argparse.Namespace) -> None:
    """Simulate the routing rules of a cluster."""
    from benchmarks.cluster import RULES, Simulation, simulate
    from benchmarks.report import save, tables

    results = []
    for share in args.utilisation:
        simulation = Simulation(args.replicas, args.adapters, args.held, args.zipf, share, args.requests)
        results += [simulate(simulation, name) for name in RULES]
        save(args.out, vars(args), results)
    print(tables(results))


def plot(args: argparse.Namespace) -> None:
    """Draw pictures of results."""
    from benchmarks.plot import pictures

    for path in pictures(args.results, args.out):
        print(path)


def show(args: argparse.Namespace) -> None:
    """Print tables of saved results, merged over several files."""
    from benchmarks.report import tables
    from benchmarks.study.tables import study_tables

    contents = [json.loads(file.read_text()) for file in args.results]
    for machine in {json.dumps(content["machine"]) for content in contents}:
        print(machine)
    records = [record for content in contents for record in content["results"]]
    print(tables(records))
    if studied := [record for record in records if record["workload"] == "study"]:
        print(study_tables(studied))


def _layout(text: str) -> tuple[int, int]:
    tensor, _, pipeline = text.partition("x")
    return int(tensor), int(pipeline)


def _out_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, help="JSON file to write")


def _folder_flags(sub: argparse.ArgumentParser) -> None:
    text = "folder for generated models and adapters (18 MB per LLaMA-2 7B adapter); later runs reuse them"
    sub.add_argument("--folder", type=Path, required=True, help=text)
    sub.add_argument("--engine", type=json.loads, default={}, help="further engine arguments, as JSON")


def _variant_flags(sub: argparse.ArgumentParser, adapters: int) -> None:
    sub.add_argument("--size", choices=SIZES, default="llama2-7b", help="default: %(default)s")
    sub.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    sub.add_argument("--adapters", type=int, default=adapters, help="number of PARADE adapters (default: %(default)s)")
    sub.add_argument("--slots", type=int, default=64, help="number of slots, --max-parades (default: %(default)s)")
    sub.add_argument("--kv-cache-gib", type=float, default=44, help="KV cache of each variant (default: %(default)s)")
    sub.add_argument("--skip-gate", action="store_true", help="only if it just passed with this code and machine")
    _folder_flags(sub)
    _out_flag(sub)


def _workload_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("workloads", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    sub.add_argument("--repeats", type=int, default=3, help="of long runs; short runs get more (default: %(default)s)")
    text = "start all engines at once, if they fit on the device, and measure in turns, so that drift affects all alike"
    sub.add_argument("--side-by-side", action="store_true", help=text)
    _variant_flags(sub, adapters=256)


def parser() -> argparse.ArgumentParser:
    """The argument parser of `python -m benchmarks`."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command(run, "Measure offline: one engine per variant runs all named workloads.")
    _workload_flags(sub)

    sub = command(parallel, "Measure offline like `run`, with the model on several GPUs.")
    _workload_flags(sub)
    text = "tensor-parallel and pipeline-parallel sizes (default: 1x1 2x1)"
    sub.add_argument("--layouts", nargs="+", type=_layout, default=[(1, 1), (2, 1)], metavar="TPxPP", help=text)

    sub = command(serve, "Measure servers under recorded traffic, with vLLM's own client.")
    sub.add_argument("--trace", type=Path, required=True, help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens")
    sub.add_argument("--requests", type=int, default=500, help="from the trace's start (default: %(default)s)")
    sub.add_argument("--speed", type=float, default=1.0, help="2 replays in half the time (default: %(default)s)")
    _variant_flags(sub, adapters=64)

    sub = command(kernels, "Measure the generator's kernels alone, without an engine; needs a GPU.")
    sub.add_argument("--size", choices=SIZES, default="llama2-7b", help="default: %(default)s")
    sub.add_argument("--repeats", type=int, default=30, help="default: %(default)s")
    _out_flag(sub)

    sub = command(exactness, "Compare answers with the float32 reference; exit code 1 if they differ.")
    sub.add_argument("--model", help="folder of a real model; default: a tiny random model in float32")
    sub.add_argument(
        "--adapters", nargs="+", default=[], help="folders of adapters for --model; default: random strong ones"
    )
    sub.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    _folder_flags(sub)
    _out_flag(sub)

    sub = command(
        study, "Train PARADE, LoRA and (IA)3 side by side on real tasks, and measure what reading the prompt gains."
    )
    add_flags(sub)
    _out_flag(sub)

    sub = command(cluster, "Simulate a cluster with and without the routing rule; needs no engine.")
    sub.add_argument("--replicas", type=int, default=1000, help="default: %(default)s")
    sub.add_argument("--adapters", type=int, default=100_000, help="default: %(default)s")
    sub.add_argument("--held", type=int, default=256, help="adapters in a replica's host memory (default: %(default)s)")
    sub.add_argument("--zipf", type=float, default=1.0, help="Zipf exponent of popularity (default: %(default)s)")
    text = "offered load, as a share of the requests that all replicas can run at a time"
    sub.add_argument("--utilisation", type=float, nargs="+", default=[0.5, 0.7, 0.85], help=text)
    sub.add_argument("--requests", type=int, default=1_000_000, help="default: %(default)s")
    _out_flag(sub)

    sub = command(show, "Print result files as tables, with ratios between variants of different files.")
    sub.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files of the other commands")

    sub = command(plot, "Draw pictures from result files, merged by model size and card.")
    sub.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files of `run`")
    sub.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    return top


if __name__ == "__main__":
    arguments = parser().parse_args()
    arguments.function(arguments)
