# SPDX-License-Identifier: Apache-2.0
"""Log handlers that keep working after logging is configured again."""

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
    """Whether the handler still has its target, and the lines in its file."""
    file = tmp_path / f"{how}.log"
    command = [sys.executable, "-c", SCRIPT, str(file), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip(), file.read_text().split()


def test_a_configuration_closes_what_is_not_kept(tmp_path: Path) -> None:
    """If Python no longer does this, vllm_parade.cluster.logs can be removed."""
    assert lines(tmp_path, "lost") == ("False", ["before"])


def test_kept_handlers_write_on(tmp_path: Path) -> None:
    assert lines(tmp_path, "kept") == ("True", ["before", "after"])
