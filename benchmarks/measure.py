# SPDX-License-Identifier: Apache-2.0
"""The process that measures one variant: one engine runs all workloads and prints each result as a line of JSON.

`python -m benchmarks run` starts one process per variant, so that each starts with empty device memory.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from threading import Barrier
from typing import Any

from benchmarks.engine import Settings, Variant, used_mib
from benchmarks.report import Record
from benchmarks.samples import Measured
from benchmarks.workloads import WORKLOADS, touch

MARK = "RESULT "
STARTED = "RESULTS START"
END = "RESULTS END"


def records(settings: Settings) -> Iterator[Record]:
    """Measure one engine; yields all its records."""
    variant = Variant(settings)
    if settings.turns:
        print(STARTED, flush=True)
        sys.stdin.readline()
    start_mib = used_mib()
    yield {"workload": "start", "variant": variant.name, "seconds": variant.start_s}
    if variant.adapters:
        seconds = touch(variant, variant.adapters)
        count = len(variant.adapters)
        record = {"adapters": count, "seconds": seconds, "ms_per_adapter": 1e3 * seconds / count}
        yield {"workload": "loading", "variant": variant.name, **record}
    measured = Measured(variant)
    for name in settings.workloads:
        yield from WORKLOADS[name](measured)
    memory = {"allocated_mib": variant.allocated_mib(), **variant.parade_mib()}
    if not settings.turns:
        # Side by side, the device's memory belongs to several engines. Allocators do not return memory, so the used
        # memory at the end is the peak.
        memory |= {"start_mib": start_mib, "peak_mib": used_mib()}
    yield {"workload": "memory", "variant": variant.name, **memory}


def results_of(command: list[str], together: Barrier | None = None) -> list[dict[str, Any]]:
    """Run a command, pass its output on, and return the records of its result lines.

    The command's processes are killed after its last result. An engine's shutdown is not measured.

    Args:
        together: barrier of commands that run side by side. No command continues before all have started, and none is
            killed before all have finished.

    Raises:
        SystemExit: the command failed.
    """
    results, ended = [], False
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(MARK):
                    results.append(json.loads(line.removeprefix(MARK)))
                if line.strip() == STARTED and together is not None:
                    together.wait()
                    print(file=process.stdin, flush=True)
                if line.strip() == END:
                    if together is not None:
                        together.wait()
                    ended = True
                    break
        finally:
            if not ended and together is not None:
                together.abort()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if not ended:
        raise SystemExit(f"benchmarks: {' '.join(command[:4])} ended early; its output is above")
    return results


def measure(settings: Settings, together: Barrier | None = None) -> list[dict[str, Any]]:
    """Records of one variant, measured in a separate process."""
    return results_of([sys.executable, "-m", "benchmarks.measure", settings.to_json()], together)


def prepare_environment() -> None:
    """Set the environment variables of engines; call it before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Generating adapters starts OpenMP threads, and a forked copy of such a process hangs.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


if __name__ == "__main__":
    prepare_environment()
    for result in records(Settings.from_json(sys.argv[1])):
        print(MARK + json.dumps(result), flush=True)
    print(END, flush=True)
