# SPDX-License-Identifier: Apache-2.0
"""What PARADE adds to vLLM's scheduler.

A request's vectors are read off its whole instruction, layer by layer, while the instruction passes through the model.
So where no row holds them yet a request is scheduled with its whole instruction in one step or not at all, and no
cached keys and values count for it. Where one does, since another request had the same instruction, or this one before
it was preempted, the request is scheduled like any other: in chunks, or from the prefix cache. Requests of the base
model are vLLM's own business.

Who comes first is vLLM's business too (order of arrival, or priority), so no adapter holds slots or rows for ever: a
slot is held for one step, a row while its request runs. But an instruction passes whole, and what runs takes its tokens
of every step first. So that a long one is not kept waiting while the rest goes on, running requests take a smaller
share of one step, or none, once an instruction has found no room in PATIENCE steps.
"""

from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from vllm_parade.config import ServingConfig, drafting_slots, step_tokens
from vllm_parade.request import PLAN_ATTRIBUTE, Instruction, InstructionKey, StepPlan
from vllm_parade.scheduler.rows import RowCache
from vllm_parade.scheduler.slots import SlotCache
from vllm_parade.stats import RowCounts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as Base
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request
else:
    Base = object

# Steps in which an instruction may find no room before running requests make some.
PATIENCE = 4
# Of a vLLM request: its instruction.
ATTRIBUTE = "parade_instruction"


def instruction_of(request: "Request") -> Instruction | None:
    """The instruction of a PARADE request; None for a request of the base model."""
    # Asked for in every step, so kept on the request.
    known: dict[str, Any] = vars(request)
    if ATTRIBUTE not in known:
        known[ATTRIBUTE] = Instruction.from_extra_args(request.sampling_params and request.sampling_params.extra_args)
    instruction: Instruction | None = known[ATTRIBUTE]
    return instruction


class ParadeSchedulerMixin(Base):
    """Mixed into vLLM's schedulers; owns the vector rows and the adapter slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = ServingConfig.from_vllm_config(self.vllm_config)
        self.rows = RowCache(config.num_rows(self.scheduler_config.max_num_seqs))
        self.slots = SlotCache(config.max_parades)
        # An adapter that has a slot joins a step while slots last. One that must be copied into a slot first joins
        # while half of them are left: the other half is filled while the step runs, so that only the first step of a
        # crowd waits for its copies.
        self.max_cold_adapters_per_step = max(1, config.max_parades // 2)
        self.step_adapters: set[str] = set()
        # Requests that may be the ones to read an instruction in this step; only those that run by then do.
        self.step_readers: dict[InstructionKey, Request] = {}
        # The request at the head of those whose instruction found no room, and in how many steps.
        self.squeezed: Request | None = None
        self.squeezed_steps = 0
        self.step_squeezed: Request | None = None
        # Tokens of this step that running requests may take, drafting slots included; None where they are free to.
        self.share: int | None = None
        self.drafting = drafting_slots(self.vllm_config)

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        """Plan a step; the adapters that read instructions in it must fit on the device together."""
        self.step_adapters.clear()
        self.step_readers.clear()
        self.step_squeezed = None
        self.share = self._share_of_running()
        output = super().schedule(*args, **kwargs)
        if self.step_squeezed is None and self.waiting and self._is_full(output):
            # vLLM did not look at any waiting request.
            self.step_squeezed = self.waiting.peek_request()
        if self.share is not None:
            # If something else than room was missing, the others do not wait for it in the next step again.
            self.squeezed, self.squeezed_steps = None, 0
        elif self.step_squeezed is not None:
            again = self.step_squeezed is self.squeezed
            self.squeezed, self.squeezed_steps = self.step_squeezed, self.squeezed_steps + 1 if again else 1
        return output

    def _share_of_running(self) -> int | None:
        request = self.squeezed
        if request is None or request.is_finished() or self.squeezed_steps < PATIENCE:
            return None
        can_start = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        if not can_start or not self._admits_requests():
            return None
        instruction = self._unread(request)
        return None if instruction is None else step_tokens(self.vllm_config) - instruction.tokens

    def _admits_requests(self) -> bool:
        """Whether vLLM lets waiting requests start in the next step: its own two conditions."""
        num_running = len(self.running) + self.num_waiting_for_streaming_input
        return self.pause_state == PauseState.UNPAUSED and num_running < self.max_num_active_reqs

    def _is_full(self, output: "SchedulerOutput") -> bool:
        """Whether a step has no token left, of those that are scheduled or of those that the model takes as input."""
        tokens = output.total_num_scheduled_tokens
        inputs = tokens + self.drafting * len(output.num_scheduled_tokens)
        room = self.scheduler_config.max_num_batched_tokens - inputs
        return tokens >= self.max_num_scheduled_tokens or room <= self.drafting

    def _unread(self, request: "Request") -> Instruction | None:
        """The instruction that a request must read itself; None if a row holds its vectors, or needs to hold none."""
        if self.rows.holds(request.request_id):
            return None
        instruction = instruction_of(request)
        if instruction is None or instruction.key in self.rows:
            return None
        reader = self.step_readers.get(instruction.key)
        # A reader that runs was scheduled in this very step; its row is written before anybody's token is scaled.
        return None if reader is not None and reader.status == RequestStatus.RUNNING else instruction

    def _get_local_prefix_cache_hit(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        if self._unread(request) is None:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        # Cached keys and values would skip tokens that the generators must read.
        skip, request.skip_reading_prefix_cache = request.skip_reading_prefix_cache, True
        try:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        finally:
            request.skip_reading_prefix_cache = skip

    def _reserve_prefill_lookahead(self, request: "Request", num_computed_tokens: int, num_new_tokens: int) -> int:
        if request.status == RequestStatus.RUNNING:
            # Whoever runs holds a row, or needs none.
            if self.share is not None:
                num_new_tokens = max(0, min(num_new_tokens, self.share - self.drafting))
                self.share -= num_new_tokens + self.drafting if num_new_tokens else 0
        elif (instruction := self._unread(request)) is not None:
            if num_new_tokens < instruction.tokens:
                self.step_squeezed = self.step_squeezed or request
            if num_computed_tokens > 0 or num_new_tokens < instruction.tokens or not self._can_generate(instruction):
                return 0
            if request is self.squeezed:
                self.squeezed = None
            self.step_adapters.add(instruction.adapter)
            self.step_readers[instruction.key] = request
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _can_generate(self, instruction: Instruction) -> bool:
        if instruction.adapter in self.step_adapters:
            return True
        is_cold = instruction.adapter not in self.slots
        return len(self.step_adapters) < (self.max_cold_adapters_per_step if is_cold else self.slots.num_slots)

    def _update_after_schedule(self, scheduler_output: "SchedulerOutput") -> None:
        setattr(scheduler_output, PLAN_ATTRIBUTE, self._plan(scheduler_output.num_scheduled_tokens))
        super()._update_after_schedule(scheduler_output)

    def _plan(self, scheduled: dict[str, int]) -> StepPlan:
        rows, unread = {}, {}
        # First those that hold or find a row, so that making room for the others takes none of these.
        for name in scheduled:
            if self.rows.holds(name):
                rows[name] = self.rows.row(name)
            elif (instruction := instruction_of(self.requests[name])) is None:
                continue
            elif instruction.key in self.rows:
                rows[name] = self.rows.acquire(name, instruction.key)
            else:
                unread[name] = instruction
        instructions = {}
        for name, instruction in unread.items():
            if instruction.key in self.rows:
                rows[name] = self.rows.acquire(name, instruction.key)
                continue
            if self.requests[name].num_computed_tokens > 0 or scheduled[name] < instruction.tokens:
                raise RuntimeError(f"request {name} was scheduled with a part of its instruction")
            rows[name] = self.rows.allocate(name, instruction.key)
            instructions[name] = instruction
        adapters = dict.fromkeys(instruction.adapter for instruction in instructions.values())
        slots = self.slots.activate(adapters)
        # Workers pass over a step without tokens, and what it would have copied.
        upcoming = self.slots.activate(self._upcoming(adapters)) if scheduled else {}
        return StepPlan(rows, instructions, slots, upcoming)

    def _upcoming(self, adapters: Collection[str]) -> Collection[str]:
        """Adapters of the next instructions to come, for the slots that those of this step leave."""
        upcoming: dict[str, None] = {}
        for request in islice(self.waiting, self.max_num_running_reqs):
            if len(adapters) + len(upcoming) == self.slots.num_slots:
                break
            instruction = self._unread(request)
            if instruction is not None and instruction.adapter not in adapters:
                upcoming[instruction.adapter] = None
        return upcoming

    def _preempt_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self.rows.release(request.request_id)
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self.rows.release(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Drop cached keys and values, and cached vectors, which were made of the same weights."""
        done = super().reset_prefix_cache(*args, **kwargs)
        self.rows.forget()
        return done

    def make_stats(self, *args: Any, **kwargs: Any) -> "SchedulerStats | None":
        """A step's stats, with the row counts on them; None where stats are off."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            RowCounts(self.rows.hits, self.rows.misses, self.rows.evictions).put(stats)
        return stats
