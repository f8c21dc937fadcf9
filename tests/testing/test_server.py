# SPDX-License-Identifier: Apache-2.0
"""The server process, with a stand-in for the `vllm` command."""

import os
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

import testing.server
from testing.server import ServerError, server

SHEBANG = f"#!{sys.executable}\n"
# Starts a child that would outlive it.
HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
print(sys.argv[1:], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
BROKEN = """
import sys
print("INFO 11-30 21:00:00 [core.py:1] first", "no such flag", sep="\\n")
sys.exit(3)
"""
STARTING = """
import time
print("(Worker pid=7) INFO 11-30 21:00:00 [core.py:1] loading", flush=True)
time.sleep(600)
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    command = folder / "vllm"
    command.write_text(SHEBANG + code)
    command.chmod(0o755)
    monkeypatch.setattr(testing.server, "VLLM", str(command))


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def test_a_healthy_server_ends_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    stand_in(monkeypatch, tmp_path, HEALTHY)
    lines: list[str] = []
    with server("m", "--max-model-len", "9", log=log, environment=dict(os.environ), report=lines.append) as url:
        with urllib.request.urlopen(f"{url}/health") as response:
            assert response.status == 200
        started, flags = log.read_text().splitlines()[:2]
        assert flags.startswith("['serve', 'm', '--host', '127.0.0.1', '--port', ")
        assert flags.endswith("'--max-model-len', '9']")
        assert is_running(child := int(started))
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert f"its log: {log}" in lines
    assert lines[-2].startswith("healthy after")


def test_a_server_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    stand_in(monkeypatch, tmp_path, BROKEN)
    with (
        pytest.raises(ServerError, match=r"ended with exit code 3; its log ends with\n.*first\nno such flag$"),
        server("m", log=log),
    ):
        pass


def test_progress_is_the_last_line_of_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    stand_in(monkeypatch, tmp_path, STARTING)
    monkeypatch.setattr(testing.server, "REPORT_EVERY_S", 0.2)
    monkeypatch.setattr(testing.server, "START_TIMEOUT_S", 3)
    lines: list[str] = []
    with pytest.raises(ServerError, match="no healthy server after 3 s"), server("m", log=log, report=lines.append):
        pass
    assert any(line.endswith(" s  loading") for line in lines)
