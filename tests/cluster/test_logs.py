# SPDX-License-Identifier: Apache-2.0
"""Handlers that outlive a new configuration of logging."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, logging.config, sys
from logging.handlers import MemoryHandler, RotatingFileHandler
from vllm_parade.cluster import logs

handler = MemoryHandler(1, target=RotatingFileHandler(sys.argv[1]))
logger = logging.getLogger("ray.serve")
logger.addHandler(handler)
logger.warning("before")
configure = lambda: logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
if sys.argv[2] == "kept":
    with logs.kept():
        configure()
else:
    configure()
logger.warning("after")
print(handler.target is not None)
"""


def lines(tmp_path: Path, how: str) -> tuple[str, list[str]]:
    """Whether the handler knows its file, and what is in the file."""
    file = tmp_path / f"{how}.log"
    command = [sys.executable, "-c", SCRIPT, str(file), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip(), file.read_text().split()


def test_a_configuration_closes_what_is_not_kept(tmp_path: Path) -> None:
    """Where Python no longer does that, vllm_parade.cluster.logs can go."""
    assert lines(tmp_path, "lost") == ("False", ["before"])


def test_kept_handlers_write_on(tmp_path: Path) -> None:
    assert lines(tmp_path, "kept") == ("True", ["before", "after"])
