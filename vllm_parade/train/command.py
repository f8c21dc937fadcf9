# SPDX-License-Identifier: Apache-2.0
"""Input checks of the commands `train`, `evaluate` and `inspect`: bad input gives a one-line error before long work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

__all__ = ["check_output_folder", "naming", "one_line_errors", "require_modules"]

EXTRA = "pip install 'vllm-parade[train]'"


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn a ValueError into one line on stderr and exit code 1."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"vllm_parade.{command}: {' '.join(str(error).split())}") from error


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Prefix a ValueError with `flag`, if its message begins with the flag's value, a file or folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def require_modules(*names: str, remedy: str = EXTRA) -> None:
    """Check that modules are installed before the work that needs them.

    Raises:
        ValueError: names the missing modules and the remedy.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; install with: {remedy}")


def check_output_folder(flag: str, folder: Path) -> None:
    """Create the output folder early, so that a bad path fails before the work.

    Raises:
        ValueError: names the flag, the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be created: {error.strerror}; give another path") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {folder}: no permission to write there; give another path")
