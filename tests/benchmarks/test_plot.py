# SPDX-License-Identifier: Apache-2.0
"""Plots of made-up results."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks.cluster import RULES
from tests.benchmarks.records import made_up, saved, step


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_pictures(tmp_path: Path):
    from benchmarks.plot import pictures

    crowd = [
        made_up("tenants", variant, adapters=count, popularity=popularity, tokens_per_s=100.0, ttft_ms=9.0)
        for variant, counts in (("parade", (1, 8, 64)), ("lora", (1, 8)))
        for count in counts
        for popularity in (("uniform", "zipf") if count > 1 else ("uniform",))
    ]
    alone = made_up("tenants", "base", adapters=0, popularity="uniform", tokens_per_s=120.0, ttft_ms=8.0)
    bars = [step(variant, batch, 6.0 + batch / 10) for variant in ("base", "unused", "parade") for batch in (1, 32)]
    rules = [
        made_up("cluster", name, utilisation=0.5, replicas=9, adapters=99, load_misses=0.1, wait_ms_mean=3.0)
        for name in RULES
    ]
    files = [saved(tmp_path / "a.json", bars), saved(tmp_path / "b.json", [*crowd, alone, *rules])]
    paths = pictures(files, tmp_path / "pictures")
    assert [path.name for path in paths] == [
        "decode_tiny_a_card.png",
        "tenants_tiny_a_card.png",
        "cluster_tiny_a_card.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in paths)
