# SPDX-License-Identifier: Apache-2.0
"""The scheduler's row counts, and how they reach the front end."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

# Prefix of a count's name in SchedulerStats and of its metric's name.
PREFIX = "parade_"


@dataclass(frozen=True)
class RowCounts:
    """Hits, misses and evictions of the vector rows since engine start.

    They are sent in `SchedulerStats.running_lora_adapters`, a dict of numbers, because msgpack carries declared fields
    only. vLLM's loggers read this field only with LoRA enabled, which PARADE refuses.
    """

    row_hits: int = 0
    """Instructions whose vectors were in a row, so that no generator ran for them."""
    row_misses: int = 0
    """Instructions for which the generators wrote a row."""
    row_evictions: int = 0
    """Cached rows, used by no running request, that were given to another instruction."""
    shared_base_tokens: int = 0
    """Prompt tokens before the first turn of a request that were in the prefix cache."""

    def __sub__(self, before: "RowCounts") -> "RowCounts":
        """The counts since `before`."""
        return RowCounts(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))

    def put(self, stats: "SchedulerStats") -> None:
        """Add the counts to a step's stats."""
        stats.running_lora_adapters.update({PREFIX + name: value for name, value in vars(self).items()})

    @classmethod
    def of(cls, stats: "SchedulerStats") -> "RowCounts | None":
        """The counts in a step's stats. None if it has none, as in stats that vLLM creates outside the scheduler."""
        carried = stats.running_lora_adapters
        if PREFIX + "row_hits" not in carried:
            return None
        return cls(**{field.name: carried[PREFIX + field.name] for field in fields(cls)})
