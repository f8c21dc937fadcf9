# SPDX-License-Identifier: Apache-2.0
"""The simulated cluster."""

import pytest

from benchmarks.cluster import LOAD_S, RULES, Simulation, simulate

SMALL = Simulation(replicas=20, adapters=2000, held=60, requests=30_000)


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {name: simulate(SMALL, name) for name in RULES}


def test_affinity_saves_loads(results: dict[str, dict]) -> None:
    assert results["affinity"]["load_misses"] < results["random"]["load_misses"] / 2
    assert results["affinity"]["load_misses"] < results["two choices"]["load_misses"] / 2


def test_affinity_keeps_nobody_waiting(results: dict[str, dict]) -> None:
    assert results["affinity"]["wait_ms_mean"] < results["two choices"]["wait_ms_mean"]
    assert results["affinity"]["wait_ms_p99"] <= 1e3 * LOAD_S
    assert results["affinity"]["most_busy"] < 1.5


def test_shares_add_up(results: dict[str, dict]) -> None:
    found = results["affinity"]
    assert found["home"] + found["spread"] + found["elsewhere"] == pytest.approx(1)
    assert results["random"]["home"] == 0


def test_one_adapter_that_fits_is_loaded_once_a_replica() -> None:
    alone = simulate(Simulation(replicas=4, adapters=1, held=1, requests=2000), "random")
    assert alone["load_misses"] == 0


def test_without_load_nobody_waits() -> None:
    quiet = simulate(Simulation(replicas=20, adapters=50, held=60, requests=5000, utilisation=0.05), "affinity")
    assert quiet["wait_ms_p50"] == 0
