# SPDX-License-Identifier: Apache-2.0
"""Tables of steps, as in test_steps, and streams of requests: no request waits forever.

In vLLM 0.32 no request passes a waiting one that does not fit. In 0.33 every request that fits passes it. The tests
cover both.
"""

import random
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.interface import PauseState

from tests.scheduler.conftest import OVERTAKES
from vllm_parade.scheduler.starvation import PATIENCE

queues = pytest.mark.parametrize("overtaking", [False, True], ids=["in order", "overtaking"])


def with_drafting(engine):
    """Let each scheduled request reserve one more token of the input, as for a draft model."""
    engine.scheduler.vllm_config.speculative_config = SimpleNamespace(max_num_new_slots_for_drafting=1)
    engine.scheduler.guard.drafting = 1


def test_running_requests_make_room(make_engine):
    """c needs all 8 tokens of a step. After four steps without room for c, a and b pause for one step."""
    engine = make_engine(step_tokens=8)
    engine.add("a", 2)
    engine.add("b", 2, "B")
    engine.add("c", 8, "A")
    both, rows = ({"a": 1, "b": 1}, "ab", "c", {"b": 1}, ""), {"b": 1, "c": 2}
    engine.expect(
        ({"a": 2, "b": 2}, "ab", "c", {"b": 1}, "b"),
        both,
        both,
        both,
        ({"c": 8}, "abc", "", rows, "c"),
        ({"a": 1, "b": 1, "c": 1}, "abc", "", rows, ""),
    )


def test_running_requests_stop_only_as_far_as_they_must(make_engine):
    """d leaves 2 of 8 tokens. a and b decode with them; base prompt c gets none in this step."""
    engine = make_engine(step_tokens=8)
    engine.add("a", 1)
    engine.add("b", 1)
    engine.add("c", 60)
    engine.add("d", 6, "A")
    busy = ({"a": 1, "b": 1, "c": 6}, "abc", "d", {}, "")
    engine.expect(
        busy,
        busy,
        busy,
        busy,
        ({"a": 1, "b": 1, "d": 6}, "abcd", "", {"d": 1}, "d"),
        ({"a": 1, "b": 1, "c": 6}, "abcd", "", {"d": 1}, ""),
    )


def test_they_do_not_stop_for_one_that_lacks_something_else(make_engine):
    """Of 4 blocks of 4 tokens, a takes two and c needs three. a does not pause: c lacks blocks, not tokens."""
    engine = make_engine(step_tokens=12, blocks=5)
    engine.add("a", 5, max_tokens=10)
    engine.add("c", 10, "A")
    alone = ({"a": 1}, "a", "c", {}, "")
    engine.expect(({"a": 5}, "a", "c", {}, ""), *[alone] * 9, ({"c": 10}, "c", "", {"c": 1}, "c"))


def test_room_for_drafting_is_made_too(make_engine):
    """Each scheduled request reserves one more of the step's 8 tokens. Beside c, only one of a and b fits."""
    engine = make_engine(step_tokens=8)
    with_drafting(engine)
    engine.add("a", 1)
    engine.add("b", 1)
    engine.add("c", 4, "A")
    both = ({"a": 1, "b": 1}, "ab", "c", {}, "")
    engine.expect(both, both, both, both, ({"a": 1, "c": 4}, "abc", "", {"c": 1}, "c"))


def test_drafting_can_leave_no_room_before_all_tokens_are_scheduled(make_engine):
    """vLLM considers no waiting request once the model's input is full: here after 4 of 8 tokens are scheduled."""
    engine = make_engine(step_tokens=8)
    with_drafting(engine)
    for name in "abcd":
        engine.add(name, 1)
    engine.add("e", 4, "A")
    engine.scheduler.max_num_running_reqs = engine.scheduler.max_num_active_reqs = 5
    four = (dict.fromkeys("abcd", 1), "abcd", "e", {}, "")
    engine.expect(four, four, four, four, ({"a": 1, "e": 4}, "abcde", "", {"e": 1}, "e"))


def test_they_do_not_stop_for_one_that_finds_no_seat(make_engine):
    """vLLM admits 2 of up to 4 requests. a and b fill all steps until a ends; then c has waited long enough to run."""
    engine = make_engine(step_tokens=8, max_num_active_seqs=2)
    engine.add("a", 2, max_tokens=8)
    engine.add("b", 99)
    engine.add("c", 8, "A")
    both = ({"a": 1, "b": 7}, "ab", "c", {}, "")
    engine.expect(({"a": 2, "b": 6}, "ab", "c", {}, ""), *[both] * 7, ({"c": 8}, "bc", "", {"c": 1}, "c"))


def test_they_do_not_stop_while_the_scheduler_is_paused(make_engine):
    engine = make_engine(step_tokens=8)
    engine.add("a", 2)
    engine.add("c", 8, "A")
    alone = ({"a": 1}, "a", "c", {}, "")
    engine.expect(({"a": 2}, "a", "c", {}, ""), *[alone] * (PATIENCE - 1))
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.expect(*[alone] * 2 * PATIENCE)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.expect(({"c": 8}, "ac", "", {"c": 1}, "c"))


def test_an_aborted_request_is_waited_for_no_longer(make_engine):
    engine = make_engine(step_tokens=8)
    engine.add("a", 2)
    engine.add("c", 8, "A")
    for _ in range(PATIENCE):
        engine.step()
    engine.abort("c")
    engine.expect(({"a": 1}, "a", "", {}, ""))


@queues
@pytest.mark.parametrize(("stages", "pipeline"), [(1, 0), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(("seats", "active", "tokens", "life"), [(16, None, 2, 0), (4, None, 2, 6), (16, 4, 6, 8)])
def test_a_long_instruction_in_a_stream_of_short_requests(
    make_engine, overtaking, stages, pipeline, seats, active, tokens, life
):
    """A new base request arrives in every step and would fit beside the running ones.

    Each of them runs for 6 steps per stage, or 8 if its prompt is split. With enough seats, the instruction waits at
    most four steps. Otherwise it may also wait for a seat.
    """
    options = {"stages": stages, "pipeline": pipeline, "overtaking": overtaking, "max_num_active_seqs": active}
    engine = make_engine(step_tokens=16, max_num_seqs=seats, **options)
    for number in range(3):
        engine.add(f"s{number}", tokens, max_tokens=6, tokens=[number] * tokens)
    engine.add("x", 16, "A")
    passed = None
    for number in range(3, 40):
        engine.add(f"s{number}", tokens, max_tokens=6, tokens=[number] * tokens)
        if "x" in engine.step()[4]:
            passed = number
            break
    assert passed is not None
    assert passed - 3 <= PATIENCE + life * stages


@queues
def test_streams_go_on_beside_long_instructions(make_engine, overtaking):
    """Consecutive instructions that fill a step take at most every fifth step from a running request."""
    engine = make_engine(step_tokens=16, max_num_seqs=8, overtaking=overtaking)
    engine.add("a", 2, max_tokens=60)
    for number in range(8):
        engine.add(f"x{number}", 16, f"A{number}", max_tokens=1, tokens=[number] * 16)
    steps = [engine.step() for _ in range(40)]
    paused = [number for number, step in enumerate(steps) if "a" not in step[0]]
    assert len(paused) >= 7
    assert min(later - earlier for earlier, later in zip(paused, paused[1:], strict=False)) > PATIENCE


@queues
def test_a_crowd_with_favourites(make_engine, overtaking):
    """120 requests arrive at once under 30 adapters (Zipf's law), with 2 slots. They start in order of arrival.

    With overtaking, a request may pass those that need a third adapter, but only in that step.
    """
    engine = make_engine(step_tokens=32, max_num_seqs=8, max_parades=2, overtaking=overtaking)
    chance = random.Random(0)
    adapters = [f"A{number}" for number in range(30)]
    weights = [1 / (rank + 1) for rank in range(30)]
    waiting = {}
    for number in range(120):
        name, adapter = f"r{number}", chance.choices(adapters, weights)[0]
        length = chance.randint(1, 20)
        engine.add(name, length, adapter, tokens=[number] * length, max_tokens=chance.randint(1, 9))
        waiting[name] = adapter
    overtaken = dict.fromkeys(waiting, 0)
    for _ in range(2000):
        if not engine.scheduler.requests:
            break
        started = [name for name in engine.step()[4].split("r") if name]
        for name in (f"r{digits}" for digits in started):
            del waiting[name]
            for other in waiting:
                overtaken[other] += int(other[1:]) < int(name[1:])
    assert not waiting
    assert not engine.scheduler.requests
    if not (overtaking or OVERTAKES):
        assert not any(overtaken.values())
    # In each step in which a request is first in the queue, at most 8 others (the seats) pass it.
    assert max(overtaken.values()) <= 8 * (PATIENCE + 1)
