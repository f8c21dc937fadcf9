# SPDX-License-Identifier: Apache-2.0
"""Vector rows, adapter slots, and the rule that a whole instruction runs in one step."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_parade.scheduler.rows import RowCache
from vllm_parade.scheduler.scheduler import ParadeSchedulerMixin
from vllm_parade.scheduler.slots import SlotCache

__all__ = ["ParadeAsyncScheduler", "ParadeScheduler", "ParadeSchedulerMixin", "RowCache", "SlotCache"]


class ParadeScheduler(ParadeSchedulerMixin, Scheduler):
    """vLLM's scheduler with vector rows."""


class ParadeAsyncScheduler(ParadeSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with vector rows. It plans a step before the previous one has run."""
