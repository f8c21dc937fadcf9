# SPDX-License-Identifier: Apache-2.0
"""PARADE's extension of vLLM's model runner V1, which is used on CPUs."""

from typing import TYPE_CHECKING, Any

from vllm_parade.request import plan_of
from vllm_parade.worker.manager import ParadeManager

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Base
else:
    Base = object


class ParadeModelRunnerMixin(Base):
    """Mixin for the class of the worker's model runner V1."""

    parade: ParadeManager

    def _prepare_inputs(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        # The batch has its final order here, and the forward pass has not started.
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        self.parade.prepare(plan_of(scheduler_output), self.input_batch.req_ids, scheduler_output.num_scheduled_tokens)
        return prepared

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self.parade.batch.jobs:
            # Prompts of one token look like a decode step, whose full CUDA graph contains no generators.
            kwargs["force_uniform_decode"] = False
        return super()._determine_batch_execution_and_padding(*args, **kwargs)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self.parade.batch.clear()
        return super()._dummy_run(*args, **kwargs)
