# SPDX-License-Identifier: Apache-2.0
"""Whatever happens, a request attends to its own keys and values, and is scaled by its own vectors.

The real scheduler drives a worker that computes nothing but remembers: what each row holds, and for each entry of the
KV cache which tokens led to it under which vectors. Before every answer, what a request would read is compared with
what it would have computed alone.
"""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.conftest import BLOCK
from tests.strategies import weighted
from vllm_parade.request import IDENTITY_ROW, PLAN_ATTRIBUTE, Instruction

# Prompts that share beginnings, of 1 to 17 tokens; a few of each kind so that equal requests meet.
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]
ADD = st.tuples(
    st.just("add"),
    st.sampled_from([None, "A", "A", "B", "C"]),
    st.sampled_from([1, 4, 5, 9, 13, 17]),
    st.sampled_from([0, 0, 0, 4]),
    st.integers(1, 12),
    st.integers(0, 2),
)
STEP = st.just(("step",))
ABORT = st.tuples(st.just("abort"), st.integers(0, 9))
RESET = st.tuples(st.just("reset"), st.booleans())
SCENARIO = st.lists(weighted({ADD: 24, STEP: 36, ABORT: 12, RESET: 2}), min_size=30, max_size=80)
SIZES = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([17, 24, 64]),
        "max_num_seqs": st.integers(1, 4),
        "blocks": st.sampled_from([8, 10, 14, 1000]),
        "vector_cache": st.integers(0, 2),
        "max_parades": st.integers(1, 3),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "overtaking": st.booleans(),
    }
)
# Pipeline stages and steps planned ahead, with asynchronous scheduling and without.
DEPTH = st.sampled_from([{"stages": stages, "pipeline": stages - 1 + more} for stages in (1, 2, 3) for more in (0, 1)])


class Simulation:
    """Vectors are (adapter and instruction, number of resets before they were made)."""

    def __init__(self, engine):
        self.engine, self.scheduler = engine, engine.scheduler
        self.table = {IDENTITY_ROW: None}
        self.cache = {}
        self.resets = 0
        # What each running request was found to be scaled by when it started or resumed.
        self.vectors = {}
        self.names = deque(f"r{number}" for number in range(1000))

    def add(self, adapter, length, instruction, max_tokens, priority):
        tokens = TOKENS[:length]
        instruction = min(instruction or length, length)
        salt = f"{adapter}:{tokens[:instruction]}" if adapter else None
        options = {"tokens": tokens, "instruction": instruction, "max_tokens": max_tokens, "cache_salt": salt}
        self.engine.add(self.names.popleft(), length, adapter, priority=priority, **options)

    def abort(self, number):
        names = list(self.scheduler.requests)
        if names:
            self.engine.abort(names[number % len(names)])

    def reset(self, running):
        if self.scheduler.reset_prefix_cache(reset_running_requests=running):
            self.resets += 1

    def step(self):
        held = {name for name in self.vectors if self.scheduler.rows.holds(name)}
        self.vectors = {name: vectors for name, vectors in self.vectors.items() if name in held}
        output = self.scheduler.schedule()
        plan = getattr(output, PLAN_ATTRIBUTE)
        assert plan.slots.keys() == {instruction.adapter for instruction in plan.instructions.values()}
        # No copy that is made while the step runs goes into a slot that the step reads.
        taken = [*plan.slots.values(), *plan.upcoming.values()]
        assert len(set(taken)) == len(taken) <= self.scheduler.slots.num_slots
        assert not plan.upcoming.keys() & plan.slots.keys()
        for name, instruction in plan.instructions.items():
            self.table[plan.rows[name]] = (instruction.key, self.resets)
        for name, count in output.num_scheduled_tokens.items():
            self._run(self.scheduler.requests[name], count, plan)
        self.engine.in_flight.append((output, self.engine._answer(output)))
        if len(self.engine.in_flight) > self.engine.pipeline:
            self.scheduler.update_from_output(*self.engine.in_flight.popleft())

    def _run(self, request, count, plan):
        name, end = request.request_id, request.num_computed_tokens
        instruction = Instruction.from_extra_args(request.sampling_params.extra_args)
        vectors = self.table[plan.rows.get(name, IDENTITY_ROW)]
        if instruction is None:
            assert vectors is None
        else:
            assert vectors[0] == instruction.key
            if name not in self.vectors:
                # Found or made now, so after the last reset.
                assert vectors[1] == self.resets
                self.vectors[name] = vectors
            assert vectors == self.vectors[name]
        if name in plan.instructions:
            assert end - count == 0
            assert count >= instruction.tokens
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        prompt = request.prompt_token_ids
        tokens = [*prompt, *[7] * (end - len(prompt))][:end]
        for position in range(end):
            place, entry = (blocks[position // BLOCK], position % BLOCK), (tokens[: position + 1], vectors)
            if position >= end - count:
                self.cache[place] = entry
            assert self.cache[place] == entry, f"{name} reads {self.cache[place]} at {position}, not {entry}"


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_nobody_reads_what_is_anothers(make_engine, examples):
    @settings(max_examples=examples)
    @given(sizes=SIZES, depth=DEPTH, events=SCENARIO)
    def run(sizes, depth, events):
        simulation = Simulation(make_engine(**sizes, **depth))
        for event, *arguments in events:
            getattr(simulation, event)(*arguments)
        # In the end everybody is served: nothing is stuck. With one seat, a token comes once the stages are through.
        for _ in range(400 * depth["stages"]):
            if not simulation.scheduler.requests:
                break
            simulation.step()
        assert not simulation.scheduler.requests
        assert len(simulation.scheduler.rows) == 0

    run()
