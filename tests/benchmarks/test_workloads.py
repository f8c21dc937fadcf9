# SPDX-License-Identifier: Apache-2.0
"""The workloads' statistics of samples, and the popularity of adapters."""

import pytest

from benchmarks.samples import spread
from benchmarks.workloads import drawn


def test_spread_is_in_milliseconds():
    figures = spread([0.005, 0.001, 0.003, 0.002, 0.004, 0.006], "ttft")
    assert figures["ttft_ms"] == pytest.approx(3.5)
    assert figures["ttft_ms_p20"] == pytest.approx(2.0)
    assert figures["ttft_ms_p80"] == pytest.approx(5.0)
    assert figures["ttft_ms_all"] == [1, 2, 3, 4, 5, 6]
    assert spread([0.002], "ttft")["ttft_ms_p80"] == pytest.approx(2.0)


def test_popularity():
    names = [str(number) for number in range(100)]
    uniform, zipf = drawn(names, 2000, "uniform"), drawn(names, 2000, "zipf")
    assert uniform.count("0") < 50 < 300 < zipf.count("0")
    assert len(set(uniform)) == 100
    assert drawn(names, 5, "zipf") == drawn(names, 5, "zipf")
    assert drawn([], 5, "uniform") == []
