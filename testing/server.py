# SPDX-License-Identifier: Apache-2.0
"""Runs `vllm serve` as a child process: start it, wait until it is healthy, stop it with all its children."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# Prefer this environment's command to others in PATH.
VLLM = shutil.which("vllm", path=Path(sys.executable).parent) or "vllm"
START_TIMEOUT_S = 600
# A healthy server stops in two seconds. A server that is still starting ignores the signal.
STOP_TIMEOUT_S = 20
REPORT_EVERY_S = 5
LOG_LINES = 40
# vLLM writes process, level, time and place before every message.
LOG_PREFIX = re.compile(r"^(\([^)]*\) )?([A-Z]+ \S+ \S+ \[[^\]]*\]\s*)?")


class ServerError(RuntimeError):
    """The server did not become healthy. The message ends with the last lines of its log."""


@contextmanager
def server(
    model: str,
    *flags: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Serve a model on a free port of this machine. Yields the server's URL once it is healthy.

    Args:
        flags: flags of `vllm serve`
        log: file for the server's output
        environment: environment variables of the server; by default those of this process
        report: called with a line of progress every few seconds

    Raises:
        ServerError: the server exits early, or is not healthy after START_TIMEOUT_S.
    """
    port = free_port()
    command = [VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), *flags]
    report(f"starting {shlex.join(command)}")
    report(f"its log: {log}")
    with log.open("wb") as output:
        # Unbuffered, so that the log is up to date. In its own session, the server does not receive Ctrl-C, and its
        # children can be killed with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, log, report)
        yield url
    finally:
        report("stopping the server")
        _stop(process)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path, report: Callable[[str], None]) -> None:
    start = time.monotonic()
    next_report = start + REPORT_EVERY_S
    while not _is_healthy(url):
        now = time.monotonic()
        if (code := process.poll()) is not None:
            raise ServerError(f"the server ended with exit code {code}; its log ends with\n{_tail(log, LOG_LINES)}")
        if now - start > START_TIMEOUT_S:
            raise ServerError(
                f"no healthy server after {START_TIMEOUT_S} s; its log ends with\n{_tail(log, LOG_LINES)}"
            )
        if now >= next_report:
            report(f"{now - start:4.0f} s  {LOG_PREFIX.sub('', _tail(log, 1))[:100]}")
            next_report += REPORT_EVERY_S
        time.sleep(0.2)
    report(f"healthy after {time.monotonic() - start:.0f} s")


def _is_healthy(url: str) -> bool:
    # URLError, a refused connection and a timeout are all OSErrors.
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as response:
        return bool(response.status == 200)
    return False


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_TIMEOUT_S)
    finally:
        # Kills the engine's processes too, which are in the server's session. Runs even after a second Ctrl-C.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
