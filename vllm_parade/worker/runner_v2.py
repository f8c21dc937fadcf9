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

    def gather_batch_req_state(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        """A step that reads an instruction is no uniform decode: a full graph of decodes holds no generator.

        A prompt's last token counts as a decode, and this step's metadata is not there yet.
        """
        state, uniform_tokens = super().gather_batch_req_state(scheduler_output, *args, **kwargs)
        return state, None if plan_of(scheduler_output).readings else uniform_tokens

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
