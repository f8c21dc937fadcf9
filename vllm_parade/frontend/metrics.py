# SPDX-License-Identifier: Apache-2.0
"""The scheduler's row counts in /metrics, in `LLM.get_metrics` and in the log."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_parade.config import ServingConfig
from vllm_parade.frontend.signatures import argument
from vllm_parade.stats import PREFIX, RowCounts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

logger = init_logger("vllm.parade.metrics")

LABELS = ["model_name", "engine"]
DOCUMENTATION = {
    "row_hits": "Instructions whose vectors were cached in a row, so that no generator ran for them.",
    "row_misses": "Instructions that the generators read.",
    "row_evictions": "Cached rows that were given to another instruction.",
    "shared_base_tokens": "Prompt tokens before a request's first turn that were in the prefix cache.",
}


def add_stat_logger(
    wrapped: Callable[..., None], instance: "StatLoggerManager", args: tuple, kwargs: dict[str, Any]
) -> None:
    """Wraps StatLoggerManager.__init__: if PARADE is enabled, append its stat logger."""
    wrapped(*args, **kwargs)
    vllm_config = argument(wrapped, args, kwargs, "vllm_config")
    if ServingConfig.from_vllm_config(vllm_config).enable_parade:
        # Created after vLLM's loggers: on creation, vLLM's Prometheus logger unregisters every collector named vllm:*.
        # So a second engine in one process does not register these counters twice.
        # vLLM's counter class may be the one for Ray's exporter. Use the same class.
        counters = [one._counter_cls for one in instance.stat_loggers if hasattr(one, "_counter_cls")]
        instance.stat_loggers.append(ParadeStatLogger(vllm_config, instance.engine_indexes, *counters[:1]))


class ParadeStatLogger(AggregateStatLoggerBase):
    """Exports row counts as Prometheus counters, and logs them after vLLM's periodic line."""

    def __init__(self, vllm_config: "VllmConfig", engine_indexes: list[int], counter: Any = Counter) -> None:
        model_name = vllm_config.model_config.served_model_name
        labels: dict[int, list[object]] = {index: [model_name, str(index)] for index in engine_indexes}
        self.counters = {
            name: create_metric_per_engine(counter(f"vllm:{PREFIX}{name}", text, LABELS), labels)
            for name, text in DOCUMENTATION.items()
        }
        # By engine: the last recorded counts, and those at the last log line.
        self.recorded = dict.fromkeys(engine_indexes, RowCounts())
        self.logged = dict(self.recorded)

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Record the counts of one engine step."""
        counts = None if scheduler_stats is None else RowCounts.of(scheduler_stats)
        # Steps that only decode leave the counts unchanged.
        if counts is None or counts == self.recorded[engine_idx]:
            return
        for name, value in vars(counts - self.recorded[engine_idx]).items():
            self.counters[name][engine_idx].inc(value)
        self.recorded[engine_idx] = counts

    def log(self) -> None:
        """Log the counts since the last line. Without hits and misses, log nothing."""
        for engine_idx, counts in self.recorded.items():
            new = counts - self.logged[engine_idx]
            asked = new.row_hits + new.row_misses
            if asked:
                text = "Engine %03d: PARADE row hits: %d, misses: %d, evictions: %d, hit rate: %.1f%%"
                logger.info(
                    text, engine_idx, new.row_hits, new.row_misses, new.row_evictions, 100 * new.row_hits / asked
                )
        self.logged = dict(self.recorded)

    def log_engine_initialized(self) -> None:
        """Required by vLLM; logs nothing."""
