# SPDX-License-Identifier: Apache-2.0
"""PARADE's extension of vLLM's model runner V2, the default on GPUs.

V2 receives a preempted request again as a new one, with its generated tokens in the prompt. This has no effect here:
the step's plan contains the instructions to read and their lengths.
"""

from typing import TYPE_CHECKING, Any

from vllm_parade.request import plan_of
from vllm_parade.worker.manager import ParadeManager

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Base
else:
    Base = object


class ParadeModelRunnerV2Mixin(Base):
    """Mixin for the class of the worker's model runner V2."""

    parade: ParadeManager

    def prepare_inputs(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> "InputBatch":
        """Fill the step's metadata once the batch has its order. Dummy runs do not call this method."""
        input_batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        self.parade.prepare(plan_of(scheduler_output), input_batch.req_ids, scheduler_output.num_scheduled_tokens)
        return input_batch

    def execute_model(self, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
        """Run a step. A dummy run must not read the instructions of the last step again, so it clears the metadata."""
        if dummy_run:
            self.parade.batch.clear()
        return super().execute_model(*args, dummy_run=dummy_run, **kwargs)
