# SPDX-License-Identifier: Apache-2.0
"""The counters, on vLLM's real StatLoggerManager and with its real encoding of scheduler stats."""

import logging

import pytest
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.reader import get_metrics_snapshot
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_parade.frontend.metrics import ParadeStatLogger
from vllm_parade.plugin import register
from vllm_parade.stats import RowCounts

LABELS = {"model_name": "tiny", "engine": "0"}


@pytest.fixture
def make_manager(engine_config):
    """A function that creates a manager as the front end does. `parade` enables PARADE."""
    register()

    def make(parade=True, **options):
        config = engine_config(enable_parade=parade, served_model_name="tiny")
        manager = StatLoggerManager(vllm_config=config, **options)
        manager.log_engine_initialized()
        return manager

    return make


@pytest.fixture
def lines():
    """Log lines of vLLM and of the plugin from here on, at level INFO."""
    logged, log = [], logging.getLogger("vllm")
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: logged.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield logged
    log.removeHandler(handler)
    log.setLevel(level)


def stats(counts=None):
    """A step's stats with these counts of hits, misses and evictions since the engine's start."""
    result = SchedulerStats()
    if counts is not None:
        RowCounts(*counts).put(result)
    return result


def answered():
    """Stats of a step that generated a token. vLLM logs its line only if there was one since the last line."""
    result = IterationStats()
    result.num_generation_tokens = 1
    return result


def served():
    """PARADE's metrics by name, as `LLM.get_metrics` and `/metrics` read them."""
    return {metric.name: metric for metric in get_metrics_snapshot() if "parade" in metric.name}


def values():
    """Hits, misses and evictions."""
    return tuple(served()[f"vllm:parade_row_{name}"].value for name in ("hits", "misses", "evictions"))


def test_counters_stand_at_zero_from_the_start(make_manager):
    make_manager()
    assert list(served()) == [f"vllm:parade_{name}" for name in vars(RowCounts())]
    assert [metric.labels for metric in served().values()] == [LABELS] * len(vars(RowCounts()))
    assert values() == (0, 0, 0)
    for name in ("hits", "misses", "evictions"):
        assert REGISTRY.get_sample_value(f"vllm:parade_row_{name}_total", LABELS) == 0


def test_every_engine_has_its_own_labels(make_manager):
    manager = make_manager(engine_idxs=[0, 1])
    manager.record(stats((1, 2, 0)), None, engine_idx=1)
    hits = [REGISTRY.get_sample_value("vllm:parade_row_hits_total", {**LABELS, "engine": index}) for index in "01"]
    assert hits == [0, 1]


def test_counters_follow_the_scheduler(make_manager):
    """Steps without stats, and stats without PARADE's counts, change nothing."""
    manager = make_manager()
    for step in (stats((0, 1, 0)), None, stats((0, 1, 0)), stats(), stats((3, 5, 2))):
        manager.record(step, None)
    assert values() == (3, 5, 2)


def test_counts_cross_to_another_process():
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats((3, 5, 2))))
    outputs = MsgpackDecoder(EngineCoreOutputs).decode(encoded)
    assert RowCounts.of(outputs.scheduler_stats) == RowCounts(row_hits=3, row_misses=5, row_evictions=2)


def test_no_parade_no_counters(make_manager):
    manager = make_manager(parade=False)
    assert served() == {}
    assert not [mine for mine in manager.stat_loggers if isinstance(mine, ParadeStatLogger)]


def test_the_last_engine_of_a_process_has_the_counters(make_manager):
    """vLLM's own counters behave the same way. The second manager starts, so no metric is registered twice."""
    make_manager().record(stats((3, 5, 2)), None)
    manager = make_manager()
    assert values() == (0, 0, 0)
    manager.record(stats((0, 1, 0)), None)
    assert values() == (0, 1, 0)
    make_manager(parade=False)
    assert served() == {}


def test_a_line_follows_vllms_own(make_manager, lines):
    """It counts since the last line."""
    manager = make_manager()
    lines.clear()
    for counts in ((1, 1, 0), (4, 2, 1)):
        manager.record(stats(counts), answered())
        manager.log()
    assert [line.partition(", ")[0] for line in lines[::2]] == ["Engine 000: Avg prompt throughput: 0.0 tokens/s"] * 2
    assert lines[1::2] == [
        "Engine 000: PARADE row hits: 1, misses: 1, evictions: 0, hit rate: 50.0%",
        "Engine 000: PARADE row hits: 3, misses: 1, evictions: 1, hit rate: 75.0%",
    ]


def test_no_line_where_no_adapter_was_asked(make_manager, lines):
    manager = make_manager()
    manager.record(stats((1, 1, 0)), None)
    manager.log()
    lines.clear()
    manager.record(stats((1, 1, 0)), None)
    manager.log()
    assert not [line for line in lines if "PARADE" in line]


def test_vllms_own_loggers_read_nothing_of_the_counts(make_manager, lines):
    """vLLM's metrics and log line do not change with the counts."""
    seen = []
    for step in (stats(), stats((3, 5, 2))):
        manager = make_manager()
        manager.record(step, answered())
        manager.log()
        metrics = [metric for metric in get_metrics_snapshot() if "parade" not in metric.name]
        # The start of the line has tokens per second, which vary.
        (line,) = [line.partition("Running: ")[2] for line in lines if "Running: " in line]
        lines.clear()
        seen.append((metrics, line))
    assert seen[0] == seen[1]
    assert line.startswith("0 reqs, Waiting: 0 reqs, CPU KV cache usage: 0.0%")
    assert len(metrics) > 20
