# SPDX-License-Identifier: Apache-2.0
"""The verdict of the gate on made-up records."""

from typing import Any

import pytest

from benchmarks.exactness import BFLOAT16_BOUND, bfloat16_ratios, failures
from tests.benchmarks.records import made_up


def exact(variant: str, dtype: str, different: int, difference: float) -> dict[str, Any]:
    figures = {"max_difference": difference, "mean_difference": difference / 10, "mean_effect": 0.1}
    return made_up("exactness", variant, dtype=dtype, model="m", tokens=9, different_tokens=different, **figures)


def test_gate():
    assert not failures([exact("base", "float32", 0, 1e-4), exact("a", "float32", 0, 9e-4)])
    assert "float32, m, a: 1 of 9" in failures([exact("a", "float32", 1, 1e-4)])[0]
    assert len(failures([exact("a", "float32", 0, 2e-3)])) == 1
    assert "too little" in failures([{**exact("a", "float32", 0, 1e-4), "mean_effect": 1e-3}])[0]
    # Rounding to bfloat16 changes tokens of the base model too.
    rows = [exact("base", "bfloat16", 3, 0.1), exact("a", "bfloat16", 3, 0.12)]
    assert not failures(rows)
    assert bfloat16_ratios(rows)["a"]["max_difference"] == pytest.approx(1.2)
    assert len(failures([rows[0], exact("b", "bfloat16", 0, 0.11 * BFLOAT16_BOUND)])) == 2
