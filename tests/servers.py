"""The real `vllm` command as a child process: started, watched, taken down with its children."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VLLM = str(Path(sys.executable).with_name("vllm"))
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 10


def environment() -> dict[str, str]:
    """This process's own, less what the tests set for engines that live inside it."""
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {
        **inherited,
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_to_the_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `vllm` command that is expected to end by itself; standard output and error are kept together."""
    return subprocess.run(
        [VLLM, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_TIMEOUT_S,
    )


@contextmanager
def server(model: str, *flags: str, log: Path) -> Iterator[str]:
    """`vllm serve`, healthy; yields its URL."""
    port = free_port()
    command = [VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url, log)
        yield url
    finally:
        stop(process)


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return as soon as the server answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_healthy(url):
        state = "ended" if process.poll() is not None else "is late" if time.monotonic() > deadline else None
        assert state is None, f"the server {state}; its log:\n{log.read_text(errors='replace')[-4000:]}"
        time.sleep(0.2)


def _is_healthy(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as response:
        return bool(response.status == 200)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, and whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
