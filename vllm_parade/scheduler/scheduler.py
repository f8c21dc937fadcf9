# SPDX-License-Identifier: Apache-2.0
"""PARADE's extension of vLLM's scheduler.

The generators compute a request's vectors from its whole instruction, layer by layer, while the instruction runs
through the model. If no row holds the vectors yet, the request gets its whole instruction in one step or no tokens, and
its prefix-cache hits are ignored. A row may already hold them, from another request with the same instruction or from
before a preemption. Then the request is scheduled like any other: in chunks, or from the prefix cache. Requests of the
base model are scheduled by vLLM alone.

vLLM decides the order of requests (arrival or priority). No adapter can occupy slots or rows forever: a slot is held
for one step, a row while its request runs. But running requests take their tokens of each step first, so a long
instruction could starve. After PATIENCE steps without room for an instruction, running requests get fewer tokens for
one step, or none.
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

# Number of steps without room for an instruction after which running requests get fewer tokens.
PATIENCE = 4
# Attribute of a vLLM request that caches its instruction.
ATTRIBUTE = "parade_instruction"


def instruction_of(request: "Request") -> Instruction | None:
    """The instruction of a PARADE request; None for a request of the base model."""
    # Cached on the request, because every step needs it.
    known: dict[str, Any] = vars(request)
    if ATTRIBUTE not in known:
        known[ATTRIBUTE] = Instruction.from_extra_args(request.sampling_params and request.sampling_params.extra_args)
    instruction: Instruction | None = known[ATTRIBUTE]
    return instruction


class ParadeSchedulerMixin(Base):
    """Mixin for vLLM's schedulers. Owns the vector rows and the adapter slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = ServingConfig.from_vllm_config(self.vllm_config)
        self.rows = RowCache(config.num_rows(self.scheduler_config.max_num_seqs))
        self.slots = SlotCache(config.max_parades)
        # A step admits adapters without a slot only until it uses half of the slots. The other half is filled for later
        # steps while this step runs. So with many new adapters, only the first step waits for copies.
        self.max_cold_adapters_per_step = max(1, config.max_parades // 2)
        self.step_adapters: set[str] = set()
        # The last candidate to read each instruction in this step. It reads the instruction only if vLLM schedules it.
        self.step_readers: dict[InstructionKey, Request] = {}
        # The first waiting request whose instruction found no room, and in how many steps it found none.
        self.squeezed: Request | None = None
        self.squeezed_steps = 0
        self.step_squeezed: Request | None = None
        # Tokens, drafting slots included, that running requests may still take in this step. None means no limit.
        self.share: int | None = None
        self.drafting = drafting_slots(self.vllm_config)

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        """Plan a step. The adapters that read instructions in it must fit into the slots together."""
        self.step_adapters.clear()
        self.step_readers.clear()
        self.step_squeezed = None
        self.share = self._share_of_running()
        output = super().schedule(*args, **kwargs)
        if self.step_squeezed is None and self.waiting and self._is_full(output):
            # The step was full before vLLM considered a waiting request.
            self.step_squeezed = self.waiting.peek_request()
        if self.share is not None:
            # If the request lacked something other than tokens, running requests must not stop again in the next step.
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
        """Whether vLLM admits waiting requests in the next step. These are vLLM's own two conditions."""
        num_running = len(self.running) + self.num_waiting_for_streaming_input
        return self.pause_state == PauseState.UNPAUSED and num_running < self.max_num_active_reqs

    def _is_full(self, output: "SchedulerOutput") -> bool:
        """Whether a step has no tokens left to schedule, or the model's input has no room left."""
        tokens = output.total_num_scheduled_tokens
        inputs = tokens + self.drafting * len(output.num_scheduled_tokens)
        room = self.scheduler_config.max_num_batched_tokens - inputs
        return tokens >= self.max_num_scheduled_tokens or room <= self.drafting

    def _unread(self, request: "Request") -> Instruction | None:
        """The instruction that a request must read itself.

        None if a row holds its vectors, if a request of this step writes them, or if it has no adapter.
        """
        if self.rows.holds(request.request_id):
            return None
        instruction = instruction_of(request)
        if instruction is None or instruction.key in self.rows:
            return None
        reader = self.step_readers.get(instruction.key)
        # A running reader was scheduled in this step. Its row is written before any token of the step is scaled.
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
            # A running request holds a row or has no adapter, so it reads no instruction.
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
        # Requests that hold or find a row come first, so that allocating rows for the others evicts none of these.
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
                raise RuntimeError(f"request {name} was scheduled with only a part of its instruction")
            rows[name] = self.rows.allocate(name, instruction.key)
            instructions[name] = instruction
        adapters = dict.fromkeys(instruction.adapter for instruction in instructions.values())
        slots = self.slots.activate(adapters)
        # Workers skip a step without tokens and would not copy its adapters.
        upcoming = self.slots.activate(self._upcoming(adapters)) if scheduled else {}
        return StepPlan(rows, instructions, slots, upcoming)

    def _upcoming(self, adapters: Collection[str]) -> Collection[str]:
        """Adapters of the next waiting instructions, for the slots that this step does not use."""
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
        """Drop cached keys and values, and the cached vectors, which depend on the same weights."""
        done = super().reset_prefix_cache(*args, **kwargs)
        self.rows.forget()
        return done

    def make_stats(self, *args: Any, **kwargs: Any) -> "SchedulerStats | None":
        """A step's stats with the row counts. None if stats are disabled."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            RowCounts(self.rows.hits, self.rows.misses, self.rows.evictions).put(stats)
        return stats
