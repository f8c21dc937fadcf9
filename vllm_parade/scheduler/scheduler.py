# SPDX-License-Identifier: Apache-2.0
"""What PARADE adds to vLLM's scheduler.

A request's vectors are read off its whole instruction, layer by layer, while the instruction passes through the model.
So a request without a row is scheduled with its whole instruction in one step or not at all, and no cached keys and
values count for it. A request with a row is scheduled like any other: in chunks, or from the prefix cache. Requests of
the base model are vLLM's own business.
"""

from typing import TYPE_CHECKING, Any

from vllm_parade.config import ServingConfig
from vllm_parade.request import PLAN_ATTRIBUTE, Instruction, StepPlan
from vllm_parade.scheduler.rows import RowPool

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as Base
    from vllm.v1.request import Request
else:
    Base = object


def instruction_of(request: "Request") -> Instruction | None:
    """The instruction of a PARADE request; None for a request of the base model."""
    return Instruction.from_extra_args(request.sampling_params and request.sampling_params.extra_args)


class ParadeSchedulerMixin(Base):
    """Mixed into vLLM's schedulers; owns the vector rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = ServingConfig.from_vllm_config(self.vllm_config)
        # As many rows as requests can run, so that every running request can have one, and the identity.
        self.rows = RowPool(self.scheduler_config.max_num_seqs + 1)
        self.max_adapters_per_step = config.max_parades
        self.step_adapters: set[str] = set()

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        """Plan a step; the adapters that read instructions in it must fit on the device together."""
        self.step_adapters.clear()
        return super().schedule(*args, **kwargs)

    def _get_local_prefix_cache_hit(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        if instruction_of(request) is None or request.request_id in self.rows:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        # Cached keys and values would skip tokens that the generators must read.
        skip, request.skip_reading_prefix_cache = request.skip_reading_prefix_cache, True
        try:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        finally:
            request.skip_reading_prefix_cache = skip

    def _reserve_prefill_lookahead(self, request: "Request", num_computed_tokens: int, num_new_tokens: int) -> int:
        instruction = None if request.request_id in self.rows else instruction_of(request)
        if instruction is not None:
            if num_computed_tokens > 0 or num_new_tokens < instruction.tokens or not self._can_generate(instruction):
                return 0
            self.step_adapters.add(instruction.adapter)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _can_generate(self, instruction: Instruction) -> bool:
        return instruction.adapter in self.step_adapters or len(self.step_adapters) < self.max_adapters_per_step

    def _running_ids(self) -> set[str]:
        return {request.request_id for request in self.running}

    def _update_after_schedule(self, scheduler_output: "SchedulerOutput") -> None:
        setattr(scheduler_output, PLAN_ATTRIBUTE, self._plan(scheduler_output))
        super()._update_after_schedule(scheduler_output)

    def _plan(self, scheduler_output: "SchedulerOutput") -> StepPlan:
        rows: dict[str, int] = {}
        instructions: dict[str, Instruction] = {}
        for request_id in scheduler_output.num_scheduled_tokens:
            # Most requests of a step have their row already: their instruction need not be looked at.
            if request_id not in self.rows:
                instruction = instruction_of(self.requests[request_id])
                if instruction is None:
                    continue
                self.rows.allocate(request_id, self._running_ids())
                instructions[request_id] = instruction
            rows[request_id] = self.rows.row(request_id)
        return StepPlan(rows=rows, instructions=instructions)

    def _free_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self.rows.free(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Drop cached keys and values, and the vectors of requests that must be computed anew with them."""
        done = super().reset_prefix_cache(*args, **kwargs)
        running = self._running_ids()
        for request in list(self.requests.values()):
            if request.request_id not in running:
                self.rows.free(request.request_id)
        return done
