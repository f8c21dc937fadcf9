# SPDX-License-Identifier: Apache-2.0
"""The scheduler's counts are sent with vLLM's own stats of each step."""

import pytest

from vllm_parade.stats import RowCounts


def counts_of_step(engine):
    """Run a step and return the counts in its stats."""
    scheduled = engine.scheduler.schedule()
    outputs = engine.scheduler.update_from_output(scheduled, engine._answer(scheduled))
    (stats,) = [output.scheduler_stats for output in outputs.values() if output.scheduler_stats is not None]
    return RowCounts.of(stats)


@pytest.mark.parametrize("pipeline", [0, 1])
def test_counts_leave_with_every_step(make_engine, pipeline):
    """There is a single row. b finds the row of a, and c evicts it."""
    engine = make_engine(max_num_seqs=1, log_stats=True, pipeline=pipeline)
    for name in "ab":
        engine.add(name, 5, "A", tokens=list(range(5)), max_tokens=1)
    engine.add("c", 6, "A", max_tokens=2)
    steps = [counts_of_step(engine) for _ in range(4)]
    assert steps == [RowCounts(0, 1, 0), RowCounts(1, 1, 0), RowCounts(1, 2, 1), RowCounts(1, 2, 1)]


def test_base_requests_count_nothing(make_engine):
    engine = make_engine(log_stats=True)
    engine.add("a", 5)
    assert counts_of_step(engine) == RowCounts(0, 0, 0)


def test_no_stats_where_they_are_off(make_engine):
    engine = make_engine(log_stats=False)
    engine.add("a", 5, "A")
    engine.step()
    assert engine.scheduler.make_stats() is None


def test_vllms_own_stats_stay(make_engine):
    engine = make_engine(log_stats=True)
    engine.add("a", 5, "A")
    engine.step()
    stats = engine.scheduler.make_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (1, 0)
