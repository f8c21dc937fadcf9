"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from testing.server import START_TIMEOUT_S
from tests.documents import ROOT, commands, texts
from tests.servers import environment

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.engine
def test_offline(smollm: str) -> None:
    (text,) = texts("README.md", "tests/e2e/test_examples.py::test_offline", "bash")
    ((_, *words),) = commands(text)
    # One process without compilation: other tests cover worker processes and compilation.
    quick = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**environment(), **quick},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [answer.partition(":")[0] for answer in answers] == ["base model", "sst2", "base model", "e2e"]
    assert answers[1] == "sst2: positive"
    assert answers[3].startswith("e2e: A high priced restaurant called Sea Lantern is")
    assert len(set(answers)) == 4


def test_shell_scripts_parse() -> None:
    for script in EXAMPLES.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
