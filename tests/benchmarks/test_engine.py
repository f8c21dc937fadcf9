# SPDX-License-Identifier: Apache-2.0
"""Turns of engines that are measured side by side."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.engine import Turn


def test_whoever_measures_side_by_side_waits_for_a_turn(tmp_path: Path):
    turns, order = [Turn(str(tmp_path / "turns")) for _ in range(2)], []

    def measure(number: int) -> None:
        for _ in range(3):
            with turns[number](), turns[number]():
                order.append(number)
                time.sleep(0.02)
                order.append(number)

    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(measure, range(2)))
    assert order in ([0, 0, 1, 1] * 3, [1, 1, 0, 0] * 3)
    with Turn("")():
        pass
