# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with PARADE. A fake model answers one token per request and step."""

import inspect
import textwrap
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched import scheduler as vllm_scheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_parade.adapter.turns import TurnMarkers, find_turns, turn_digests
from vllm_parade.request import EXTRA_ARGS_KEY, PLAN_ATTRIBUTE, Conversation, Instruction, StepPlan
from vllm_parade.scheduler import ParadeAsyncScheduler, ParadeScheduler

BLOCK = 4
# The token of every answer, and the tokens that start a turn and end its instruction.
ANSWER, USER, ASSISTANT = 7, 1, 2
MARKERS = TurnMarkers(start=(USER,), end=(ASSISTANT,))


SCHEDULE = inspect.getsource(vllm_scheduler.Scheduler.schedule)
# Here vLLM 0.32 stops its waiting queue at a request that does not fit.
STOP = "== 0:\n                        # The request cannot be scheduled.\n                        break"
OVERTAKES = STOP not in SCHEDULE
"""Whether waiting requests pass one that does not fit, as in vLLM 0.33."""


def with_overtaking(scheduler_class):
    """Return a scheduler class with vLLM 0.33's waiting queue. On 0.32 this edits vLLM's source."""
    if OVERTAKES:
        return scheduler_class
    source = SCHEDULE.replace(
        STOP, STOP.replace("break", "skip_request(request_queue)\n                        continue")
    )
    namespace = dict(vars(vllm_scheduler))
    exec(textwrap.dedent(source), namespace)
    middle = type("Overtaking", (vllm_scheduler.Scheduler,), {"schedule": namespace["schedule"]})
    mixin, vllm_class = scheduler_class.__bases__
    bases = (mixin, middle) if vllm_class is vllm_scheduler.Scheduler else (mixin, vllm_class, middle)
    return type(scheduler_class.__name__, bases, {})


@dataclass
class Engine:
    """A scheduler with a fake model. Requests have one-letter names; a table has one line per step (see `step`)."""

    scheduler: ParadeScheduler
    in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = field(default_factory=deque)
    pipeline: int = 0
    """Steps planned before the first of them has run: stages - 1, plus one with asynchronous scheduling."""
    plan: StepPlan | None = None
    """The plan of the last step."""

    def add(
        self,
        name,
        prompt,
        adapter=None,
        instruction=None,
        max_tokens=99,
        tokens=None,
        *,
        marked=False,
        salt="",
        **options,
    ):
        """Add a request with a prompt of `prompt` tokens. `marked`: whether its adapter marks turns."""
        tokens = tokens or [ord(name)] * prompt
        extra = None
        if adapter is not None:
            turns = find_turns(tokens[: instruction or prompt], MARKERS if marked else None)
            read = zip(turns, turn_digests(tokens, turns, salt), strict=True)
            conversation = Conversation(tuple(Instruction(adapter, *turn, digest) for turn, digest in read))
            extra = {EXTRA_ARGS_KEY: conversation.to_extra_args()}
        request = Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
            cache_salt=salt or None,
            **options,
        )
        self.scheduler.add_request(request)

    def step(self):
        """Run a step and return its table line: scheduled tokens, running, waiting, rows, requests that were read."""
        output = self.scheduler.schedule()
        self.plan = plan = getattr(output, PLAN_ATTRIBUTE)
        held = self.scheduler.rows.held
        rows = {name: row for name in self.scheduler.requests for row in held(name)}
        line = (
            dict(output.num_scheduled_tokens),
            "".join(request.request_id for request in self.scheduler.running),
            "".join(request.request_id for request in self.scheduler.waiting),
            rows,
            "".join(plan.readings),
        )
        self.in_flight.append((output, self._answer(output)))
        if len(self.in_flight) > self.pipeline:
            self.scheduler.update_from_output(*self.in_flight.popleft())
        return line

    def _answer(self, output):
        names = list(output.num_scheduled_tokens)
        partial = {name: self.scheduler.requests[name].is_prefill_chunk for name in names}
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] if partial[name] else [ANSWER] for name in names],
        )

    def expect(self, *table):
        """Compare the next steps with the lines of `table`."""
        for number, line in enumerate(table):
            assert self.step() == line, f"line {number} of the table"

    def abort(self, name):
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)


@pytest.fixture
def make_engine(tmp_path):
    """A function that makes an `Engine`. `step_tokens` is the token budget of a step."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=1, architectures=["LlamaForCausalLM"], dtype="float32"
    )
    config.save_pretrained(tmp_path)
    init_none_hash(sha256)

    def make(
        step_tokens=16,
        max_num_seqs=4,
        blocks=1000,
        pipeline=0,
        stages=1,
        vector_cache=0,
        overtaking=False,
        log_stats=False,
        **options,
    ):
        vllm_config = EngineArgs(
            str(tmp_path),
            skip_tokenizer_init=True,
            enable_parade=True,
            parade_vector_cache=vector_cache,
            max_num_batched_tokens=step_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=256,
            pipeline_parallel_size=stages,
            **options,
        ).create_engine_config()
        vllm_config.cache_config.num_gpu_blocks = blocks
        groups = [
            KVCacheGroupSpec(
                ["layer"], FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
            )
        ]
        scheduler_class = ParadeAsyncScheduler if pipeline == stages else ParadeScheduler
        scheduler = (with_overtaking(scheduler_class) if overtaking else scheduler_class)(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=log_stats,
        )
        # Stages with asynchronous scheduling need model runner V2: a request's next token waits for all stages.
        scheduler.use_v2_model_runner = stages > 1 and pipeline == stages
        return Engine(scheduler, pipeline=pipeline)

    return make
