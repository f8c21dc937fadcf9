# SPDX-License-Identifier: Apache-2.0
"""What the scheduler counts, and how it gets to the front end."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

# Before the name of a count, where it travels and in the name of its metric.
PREFIX = "parade_row_"


@dataclass(frozen=True)
class RowCounts:
    """How requests fared with the vector rows since the engine's start.

    They ride on vLLM's SchedulerStats, of which msgpack carries the declared fields and no others. The field used is a
    dict of numbers that vLLM's own loggers read where LoRA is enabled, which PARADE excludes.
    """

    hits: int = 0
    """Requests that found a row with their vectors, so that no generator ran."""
    misses: int = 0
    """Requests whose instruction was read by a generator into a row."""
    evictions: int = 0
    """Rows taken from an instruction that no running request used, for another one."""
    shared_base_tokens: int = 0
    """Prompt tokens before a first turn that the prefix cache held."""

    def __sub__(self, before: "RowCounts") -> "RowCounts":
        """What was counted since then."""
        return RowCounts(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))

    def put(self, stats: "SchedulerStats") -> None:
        """Let these counts ride on a step's stats."""
        stats.running_lora_adapters.update({PREFIX + name: value for name, value in vars(self).items()})

    @classmethod
    def of(cls, stats: "SchedulerStats") -> "RowCounts | None":
        """The counts that ride on these stats; None where there are none, as on those that vLLM makes up itself."""
        carried = stats.running_lora_adapters
        if PREFIX + "hits" not in carried:
            return None
        return cls(**{field.name: carried[PREFIX + field.name] for field in fields(cls)})
