"""`make test` runs both halves and fails if either half fails."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Replaces the virtual environment's Python: records each call and exits with the code of its half.
PYTHON = """#!/bin/sh
echo "${TRITON_INTERPRET:-0} $*" >> "$CALLS"
[ -z "$TRITON_INTERPRET" ] && exit "$MAIN_CODE"
exit "$TRITON_CODE"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("main", "triton", "green"),
    [
        (0, 0, True),
        # pytest exits with 5 if it runs no test: allowed in the second half, but not in both.
        (0, 5, True),
        (5, 5, False),
        (1, 0, False),
        (0, 1, False),
        (1, 1, False),
    ],
)
def test_both_halves_run_and_either_fails_the_target(tmp_path: Path, main: int, triton: int, green: bool) -> None:
    python, stamp, calls = tmp_path / "python", tmp_path / "stamp", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    stamp.touch()
    # If make runs these tests, its flags must not reach the make started here.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "TRITON_INTERPRET")}
    environment |= {"CALLS": str(calls), "MAIN_CODE": str(main), "TRITON_CODE": str(triton)}
    done = subprocess.run(
        ["make", "test", f"BIN={tmp_path}", f"STAMP={stamp}", "WORKERS=3", "PYTEST_ARGS=-k this"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == green, done.stdout + done.stderr
    assert calls.read_text().splitlines() == [
        "0 -m pytest --numprocesses=3 -k this",
        "1 -m pytest --numprocesses=3 -k this -m triton",
    ]
