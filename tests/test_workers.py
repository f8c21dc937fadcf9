"""Tests on several xdist workers: a shared engine starts only once, and a crashed worker fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers import FIRST, GROUPS, group, rank

ROOT = Path(__file__).parents[1]


def files() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]


def test_files_that_share_something_are_one_group() -> None:
    # Files that share the application or the engine of the real model, found by the fixture's name.
    for folder, fixture in (("tests/cluster/", "app: Cluster"), ("tests/e2e/smollm/", "llm: Any")):
        sharing = [name for name in files() if name.startswith(folder) and fixture in (ROOT / name).read_text("utf-8")]
        assert len(sharing) > 1
        assert len({group(f"{name}::test") for name in sharing}) == 1
    forking = [name for name in files() if "processes import use_processes\n" in (ROOT / name).read_text("utf-8")]
    assert {group(name) for name in forking} == {"forks"}


def test_every_rule_is_of_a_file() -> None:
    assert {name for name in GROUPS if not any(file.startswith(name) for file in files())} == set()
    assert {rank(name) for name in files()} == set(range(len(FIRST) + 1))


@pytest.mark.parametrize(("last", "code"), [("pass", 0), ("os._exit(3)", 1)])
def test_a_worker_that_crashes_fails_the_run(tmp_path: Path, last: str, code: int) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(f"import os\n\ndef test_one(): pass\n\ndef test_two(): {last}\n")
    command = [sys.executable, "-m", "pytest", "--numprocesses=2", "-p", "no:cacheprovider", "--rootdir", ".", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout
    assert ("crashed while running 'test_it.py::test_two'" in done.stdout) == bool(code)
