# SPDX-License-Identifier: Apache-2.0
"""Processes that measure at the same time."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from benchmarks.measure import END, MARK, STARTED, results_of


def test_nobody_waits_for_an_engine_that_did_not_start():
    waits = f"print({STARTED!r}, flush=True); input(); print({MARK!r} + '{{}}'); print({END!r})"

    def results(codes: list[str]) -> list[Any]:
        together = Barrier(len(codes))
        with ThreadPoolExecutor(len(codes)) as pool:
            commands = [[sys.executable, "-c", code] for code in codes]
            return [pool.submit(results_of, command, together) for command in commands]

    assert [one.result() for one in results([waits, waits])] == [[{}], [{}]]
    broken, ended = results([waits, "pass"])
    with pytest.raises(BrokenBarrierError):
        broken.result()
    with pytest.raises(SystemExit, match="ended early"):
        ended.result()
