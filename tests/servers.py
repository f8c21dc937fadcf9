"""The environment of processes that tests start, and `vllm` commands that exit by themselves."""

import os
import subprocess
import sys

import pytest

from testing.server import START_TIMEOUT_S, VLLM


def environment() -> dict[str, str]:
    """This process's environment, without the setting for in-process engines."""
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {
        **inherited,
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_to_the_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `vllm` command that exits by itself; stdout holds standard output and error."""
    return subprocess.run(
        [VLLM, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_TIMEOUT_S,
    )


def run_here(capfd: pytest.CaptureFixture[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Like `run_to_the_end`, but in this process, which has already loaded vLLM."""
    from vllm.entrypoints.cli.main import main

    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [VLLM, *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    told = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, code, told.out + told.err)
