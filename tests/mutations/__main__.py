# SPDX-License-Identifier: Apache-2.0
"""Break the package in known ways, one at a time, and check that the tests named for each mutation fail.

    python -m tests.mutations            # all of them, in about five minutes
    python -m tests.mutations "wrong row"

Mutations are applied to a copy of the project. The exit code is 1 if a mutation survives its tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns(".git", ".venv", ".gpu", "__pycache__", ".*_cache", "site", "build")


def run_tests(tree: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)


def is_caught(tree: Path, mutation: Mutation) -> bool:
    """Whether the tests fail on the broken package; prints the last line of their output."""
    file = tree / mutation.file
    intact = file.read_text(encoding="utf-8")
    assert intact.count(mutation.before) == 1, f"{mutation.name}: {mutation.file} has changed; update the mutation"
    file.write_text(intact.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        done = run_tests(tree, mutation.tests)
    finally:
        file.write_text(intact, encoding="utf-8")
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    # Only code 1 means that tests failed; 2 (interrupted) or 4 (no such test) prove nothing.
    print(f"{'caught' if done.returncode == 1 else 'SURVIVED'}: {mutation.name} ({last})", flush=True)
    return done.returncode == 1


def main(names: list[str]) -> int:
    chosen = [one for one in MUTATIONS if not names or one.name in names]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=IGNORED, symlinks=True)
        caught = [is_caught(tree, mutation) for mutation in chosen]
    print(f"{sum(caught)} of {len(caught)} mutations caught")
    return 0 if caught and all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
