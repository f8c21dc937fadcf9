# SPDX-License-Identifier: Apache-2.0
"""Processes that end when another process ends."""

import os
import subprocess
import sys

import pytest

from vllm_parade.cluster import lifeline

FOLLOWER = """
import time
from vllm_parade.cluster import lifeline

lifeline.follow()
print("up", flush=True)
time.sleep(60)
"""


def start(holder: int | None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != lifeline.VARIABLE}
    if holder is not None:
        environment[lifeline.VARIABLE] = str(holder)
    return subprocess.Popen([sys.executable, "-c", FOLLOWER], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_follower_ends_with_its_holder() -> None:
    with subprocess.Popen(["sleep", "60"]) as holder:
        follower, other = start(holder.pid), start(None)
        try:
            for process in (follower, other):
                assert process.stdout.readline() == "up\n"
            assert follower.poll() is None
            holder.kill()
            assert follower.wait(timeout=20) != 0
            assert other.poll() is None
        finally:
            for process in (follower, other):
                process.kill()
                process.communicate()


def test_a_follower_whose_holder_is_gone_already_ends() -> None:
    with subprocess.Popen(["true"]) as holder:
        holder.wait()
    follower = start(holder.pid)
    try:
        assert follower.wait(timeout=20) != 0
    finally:
        follower.kill()
        follower.communicate()


def test_the_holder_itself_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lifeline.VARIABLE, raising=False)
    lifeline.hold()
    monkeypatch.setattr(lifeline.threading, "Thread", None)
    lifeline.follow()
    assert os.environ[lifeline.VARIABLE] == str(os.getpid())
