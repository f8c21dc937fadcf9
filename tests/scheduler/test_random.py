# SPDX-License-Identifier: Apache-2.0
"""A request always attends to its own keys and values, and is scaled by its own vectors.

The real scheduler drives a simulated worker. The worker records what each row holds, and the tokens and vectors that
led to each KV-cache entry. Before every answer, it compares what a request would read with what the request would have
computed alone.
"""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.scheduler.conftest import ANSWER, ASSISTANT, BLOCK, USER
from tests.strategies import weighted
from vllm_parade.request import IDENTITY_ROW, PLAN_ATTRIBUTE, Conversation

# Prompts share prefixes, so that equal requests occur: a system prompt, then turns with the fake model's answers. One
# turn has no end token. The last tokens are start tokens only.
TOKENS = [
    *(3, 1, 4, 3, 5),
    *(USER, 9, ASSISTANT, ANSWER, ANSWER),
    *(USER, 6, 5, 3, 5, 8, ASSISTANT, *[ANSWER] * 6),
    *(USER, 9, 9),
    *(USER, 9, 4, ASSISTANT, ANSWER),
    *[USER] * 5,
]
# Adapters A to C read whole prompts, D and E mark their turns.
WHOLE = ["A", "A", "B", "C"]
MARKED = ["D", "D", "D", "E"]
LONGEST_INSTRUCTION = 17
ADD = st.tuples(
    st.just("add"),
    st.sampled_from([None, *WHOLE, *MARKED]),
    st.sampled_from([0, 0, 5, 6]),
    st.integers(1, len(TOKENS)),
    st.sampled_from([None, None, None, 4]),
    st.integers(1, 12),
    st.integers(0, 2),
)
STEP = st.just(("step",))
ABORT = st.tuples(st.just("abort"), st.integers(0, 9))
RESET = st.tuples(st.just("reset"), st.booleans())
SCENARIO = st.lists(weighted({ADD: 24, STEP: 36, ABORT: 12, RESET: 2}), min_size=30, max_size=80)
SIZES = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([LONGEST_INSTRUCTION, 24, 64]),
        "max_num_seqs": st.integers(1, 4),
        "blocks": st.sampled_from([14, 16, 20, 1000]),
        "vector_cache": st.integers(0, 3),
        "max_parades": st.integers(1, 3),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "overtaking": st.booleans(),
    }
)
# Pipeline stages and steps planned ahead, with asynchronous scheduling and without.
DEPTH = st.sampled_from([{"stages": stages, "pipeline": stages - 1 + more} for stages in (1, 2, 3) for more in (0, 1)])


class Simulation:
    """The simulated worker. It represents vectors as (instruction key, number of resets before they were made)."""

    def __init__(self, engine):
        self.engine, self.scheduler = engine, engine.scheduler
        self.table = {IDENTITY_ROW: None}
        self.cache = {}
        self.resets = 0
        # Per request, the vectors of each turn that it computed or found cached since it started or resumed.
        self.vectors = {}
        self.names = deque(f"r{number}" for number in range(1000))

    def add(self, adapter, start, length, instruction, max_tokens, priority):
        tokens = TOKENS[start : start + length] or [USER]
        marked = adapter in MARKED
        if adapter in WHOLE:
            instruction = min(instruction or len(tokens), len(tokens), LONGEST_INSTRUCTION)
        options = {"tokens": tokens, "marked": marked, "max_tokens": max_tokens, "priority": priority}
        self.engine.add(self.names.popleft(), len(tokens), adapter, instruction, **options)

    def abort(self, number):
        names = list(self.scheduler.requests)
        if names:
            self.engine.abort(names[number % len(names)])

    def reset(self, running):
        if self.scheduler.reset_prefix_cache(reset_running_requests=running):
            self.resets += 1

    def step(self):
        self._forget_those_that_stopped()
        output = self.scheduler.schedule()
        self._forget_those_that_stopped()
        plan = getattr(output, PLAN_ATTRIBUTE)
        assert plan.slots.keys() == {reading.instruction.adapter for reading in plan.readings.values()}
        # Copies made during the step never go into a slot that the step uses.
        taken = [*plan.slots.values(), *plan.upcoming.values()]
        assert len(set(taken)) == len(taken) <= self.scheduler.slots.num_slots
        assert not plan.upcoming.keys() & plan.slots.keys()
        for reading in plan.readings.values():
            self.table[reading.row] = (reading.instruction.key, self.resets)
        for name, count in output.num_scheduled_tokens.items():
            self._run(self.scheduler.requests[name], count, plan)
        assert len(self.scheduler.rows) <= len(self.scheduler.running)
        self.engine.in_flight.append((output, self.engine._answer(output)))
        if len(self.engine.in_flight) > self.engine.pipeline:
            self.scheduler.update_from_output(*self.engine.in_flight.popleft())

    def _forget_those_that_stopped(self):
        running = {r.request_id for r in self.scheduler.running if r.status == RequestStatus.RUNNING}
        self.vectors = {name: vectors for name, vectors in self.vectors.items() if name in running}

    def _run(self, request, count, plan):
        name, end = request.request_id, request.num_computed_tokens
        begin = end - count
        conversation = Conversation.from_extra_args(request.sampling_params.extra_args)
        instructions = conversation.instructions if conversation else ()
        reading = plan.readings.get(name)
        if reading is not None:
            assert begin + reading.offset == reading.instruction.start >= begin
            assert reading.instruction.end <= end
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        tokens = [*request.prompt_token_ids, *[ANSWER] * end][:end]
        known = self.vectors.setdefault(name, {})
        border, border_row = plan.borders.get(name, (count, None))
        for position in range(end):
            turn = conversation.turn_at(position) if conversation else -1
            if turn >= 0 and turn not in known:
                # Found or made now, so after the last reset.
                known[turn] = (instructions[turn].key, self.resets)
            vectors = known.get(turn)
            place = blocks[position // BLOCK], position % BLOCK
            entry = tokens[: position + 1], [known[number] for number in range(turn + 1)]
            if position >= begin:
                row = plan.rows.get(name, IDENTITY_ROW) if position < begin + border else border_row
                assert self.table[row] == vectors, f"{name} at {position}, turn {turn}"
                self.cache[place] = entry
            assert self.cache[place] == entry, f"{name} reads {self.cache[place]} at {position}, not {entry}"


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_nobody_reads_what_is_anothers(make_engine, examples):
    @settings(max_examples=examples, report_multiple_bugs=False)
    @given(sizes=SIZES, depth=DEPTH, events=SCENARIO)
    def run(sizes, depth, events):
        simulation = Simulation(make_engine(**sizes, **depth))
        for event, *arguments in events:
            getattr(simulation, event)(*arguments)
        # All requests finish. With one seat, a token takes one step per stage.
        for _ in range(1000 * depth["stages"]):
            if not simulation.scheduler.requests:
                break
            simulation.step()
        assert not simulation.scheduler.requests
        assert len(simulation.scheduler.rows) == 0

    run()
