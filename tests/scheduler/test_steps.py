# SPDX-License-Identifier: Apache-2.0
"""Tables of steps. Their columns: scheduled tokens, running, waiting, rows, requests whose instruction is read."""

import pytest

from tests.scheduler.conftest import OVERTAKES


def test_instruction_passes_whole_beside_a_base_prompt_in_chunks(make_engine):
    """A step holds 8 tokens. The instructions of 5 and 6 tokens run in one step each; base prompt b fills the rest."""
    engine = make_engine(step_tokens=8)
    engine.add("a", 5, "A")
    engine.add("b", 9)
    engine.add("c", 6, "A")
    engine.expect(
        ({"a": 5, "b": 3}, "ab", "c", {"a": 1}, "a"),
        # b's 6 tokens and a's one leave room for one. c waits, since its instruction is never split.
        ({"a": 1, "b": 6}, "ab", "c", {"a": 1}, ""),
        ({"a": 1, "b": 1, "c": 6}, "abc", "", {"a": 1, "c": 2}, "c"),
        ({"a": 1, "b": 1, "c": 1}, "abc", "", {"a": 1, "c": 2}, ""),
    )


def test_instruction_as_long_as_a_step(make_engine):
    """It needs a step of its own. The front end rejects longer instructions."""
    engine = make_engine(step_tokens=8)
    engine.add("a", 8, "A")
    engine.add("b", 8)
    engine.expect(
        ({"a": 8}, "a", "b", {"a": 1}, "a"),
        ({"a": 1, "b": 7}, "ab", "", {"a": 1}, ""),
        ({"a": 1, "b": 1}, "ab", "", {"a": 1}, ""),
    )


@pytest.mark.skipif(OVERTAKES, reason="this vLLM lets requests overtake")
def test_head_of_the_queue_is_not_overtaken(make_engine):
    """c needs all 8 tokens of a step and waits until a and b finish. d would fit, but stays behind c."""
    engine = make_engine(step_tokens=8)
    engine.add("a", 2, max_tokens=3)
    engine.add("b", 2, "B", max_tokens=2)
    engine.add("c", 8, "A")
    engine.add("d", 1, "A")
    engine.expect(
        ({"a": 2, "b": 2}, "ab", "cd", {"b": 1}, "b"),
        ({"a": 1, "b": 1}, "ab", "cd", {"b": 1}, ""),
        ({"a": 1}, "a", "cd", {}, ""),
        # b's row stays, for requests with the same instruction.
        ({"c": 8}, "c", "d", {"c": 2}, "c"),
        ({"c": 1, "d": 1}, "cd", "", {"c": 2, "d": 3}, "d"),
    )


def test_instruction_shorter_than_the_prompt(make_engine):
    """Only the first 5 of a's 12 tokens are instruction: they run in one step, the rest in chunks."""
    engine = make_engine(step_tokens=8)
    engine.add("b", 2)
    engine.add("a", 12, "A", instruction=5)
    engine.expect(
        ({"b": 2, "a": 6}, "ba", "", {"a": 1}, "a"),
        ({"b": 1, "a": 6}, "ba", "", {"a": 1}, ""),
        ({"b": 1, "a": 1}, "ba", "", {"a": 1}, ""),
    )


def test_short_instruction_waits_too_where_it_does_not_fit(make_engine):
    """b leaves 3 tokens and a's instruction has 5. a waits, although the rest of its prompt may be split."""
    engine = make_engine(step_tokens=8)
    engine.add("b", 5)
    engine.add("a", 12, "A", instruction=5)
    engine.expect(
        ({"b": 5}, "b", "a", {}, ""),
        ({"b": 1, "a": 7}, "ba", "", {"a": 1}, "a"),
        ({"b": 1, "a": 5}, "ba", "", {"a": 1}, ""),
    )


def test_preempted_request_finds_its_row_again(make_engine):
    """5 blocks of 4 tokens. b is preempted when a and b need 6, and resumes without a generator when a is done.

    The blocks of its first 8 tokens are still cached. They are reused, since its row is cached too.
    """
    engine = make_engine(step_tokens=16, blocks=6)
    engine.add("a", 7, "A", max_tokens=4)
    engine.add("b", 7, "B")
    rows = {"a": 1, "b": 2}
    engine.expect(
        ({"a": 7, "b": 7}, "ab", "", rows, "ab"),
        ({"a": 1, "b": 1}, "ab", "", rows, ""),
        ({"a": 1}, "a", "b", {"a": 1}, ""),
        ({"a": 1}, "a", "b", {"a": 1}, ""),
        ({"b": 1}, "b", "", {"b": 2}, ""),
    )


def test_resumed_request_may_be_cut(make_engine):
    """Without prefix caching, b computes its 11 tokens again, in chunks and with its old row."""
    engine = make_engine(step_tokens=8, blocks=6, enable_prefix_caching=False)
    engine.add("a", 4, max_tokens=6)
    engine.add("b", 7, "B")
    engine.expect(
        ({"a": 4}, "a", "b", {}, ""),
        ({"a": 1, "b": 7}, "ab", "", {"b": 1}, "b"),
        ({"a": 1, "b": 1}, "ab", "", {"b": 1}, ""),
        ({"a": 1, "b": 1}, "ab", "", {"b": 1}, ""),
        ({"a": 1, "b": 1}, "ab", "", {"b": 1}, ""),
        ({"a": 1}, "a", "b", {}, ""),
        ({"b": 8}, "b", "", {"b": 1}, ""),
        ({"b": 3}, "b", "", {"b": 1}, ""),
    )


def test_row_of_a_preempted_request_is_taken_when_none_is_left(make_engine):
    """2 rows for 2 running requests. c overtakes the preempted b and takes its row; b then generates its vectors again.

    By then b has answered 5 tokens. Its 7 instruction tokens must run in one step again, even if they are cached. Its
    last 4 tokens may come later.
    """
    engine = make_engine(step_tokens=8, max_num_seqs=2, blocks=7, scheduling_policy="priority")
    engine.add("a", 7, "A", max_tokens=12, priority=0)
    engine.add("b", 7, "B", priority=2)
    engine.expect(
        ({"a": 7}, "a", "b", {"a": 1}, "a"),
        ({"a": 1, "b": 7}, "ab", "", {"a": 1, "b": 2}, "b"),
        *[({"a": 1, "b": 1}, "ab", "", {"a": 1, "b": 2}, "")] * 4,
    )
    engine.add("c", 4, "C", max_tokens=2, priority=1)
    engine.expect(
        # Both need their fourth block.
        ({"a": 1}, "a", "cb", {"a": 1}, ""),
        ({"a": 1, "c": 4}, "ac", "b", {"a": 1, "c": 2}, "c"),
        ({"a": 1, "c": 1}, "ac", "b", {"a": 1, "c": 2}, ""),
        *[({"a": 1}, "a", "b", {"a": 1}, "")] * 3,
        # a and c have finished. c released its row first, so b takes that one.
        ({"b": 8}, "b", "", {"b": 2}, "b"),
        ({"b": 4}, "b", "", {"b": 2}, ""),
        ({"b": 1}, "b", "", {"b": 2}, ""),
    )


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_frees_the_row(make_engine, steps):
    """Abort while it waits, after its prompt and while it decodes. Its vectors stay cached for the same instruction."""
    engine = make_engine()
    engine.add("a", 5, "A")
    for _ in range(steps):
        engine.step()
    assert len(engine.scheduler.rows) == min(steps, 1)
    engine.abort("a")
    assert len(engine.scheduler.rows) == 0
    engine.add("b", 5, "A")
    engine.expect(({"b": 5}, "b", "", {"b": min(steps, 1) + 1}, "b"))


def test_abort_of_a_preempted_request_frees_its_row(make_engine):
    engine = make_engine(step_tokens=16, blocks=6)
    engine.add("a", 7, "A")
    engine.add("b", 7, "B")
    lines = [engine.step() for _ in range(3)]
    assert lines[-1] == ({"a": 1}, "a", "b", {"a": 1}, "")
    engine.abort("b")
    engine.expect(({"a": 1}, "a", "", {"a": 1}, ""))


def test_finished_request_frees_its_row(make_engine):
    engine = make_engine()
    engine.add("a", 5, "A", max_tokens=1)
    engine.add("b", 5, "A", max_tokens=3)
    engine.expect(
        ({"a": 5, "b": 5}, "ab", "", {"a": 1, "b": 2}, "ab"),
        ({"b": 1}, "b", "", {"b": 2}, ""),
    )
    engine.add("c", 5, "A")
    engine.expect(({"b": 1, "c": 5}, "bc", "", {"b": 2, "c": 3}, "c"))


def test_more_requests_than_rows_wait_their_turn(make_engine):
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add(name, 3, "A", max_tokens=2)
    engine.expect(
        ({"a": 3, "b": 3}, "ab", "c", {"a": 1, "b": 2}, "ab"),
        ({"a": 1, "b": 1}, "ab", "c", {"a": 1, "b": 2}, ""),
    )
    name, *_ = engine.step()
    assert name == {"c": 3}


def test_reset_of_the_prefix_cache_keeps_rows_of_running_requests(make_engine):
    """Running requests keep their keys, values and vectors. A preempted request runs its generator again."""
    engine = make_engine(step_tokens=16, blocks=6)
    engine.add("a", 7, "A", max_tokens=4)
    engine.add("b", 7, "B")
    for _ in range(3):
        engine.step()
    engine.scheduler.reset_prefix_cache()
    engine.expect(
        ({"a": 1}, "a", "b", {"a": 1}, ""),
        ({"b": 9}, "b", "", {"b": 1}, "b"),
    )


def test_reset_with_running_requests_generates_all_anew(make_engine):
    engine = make_engine()
    engine.add("a", 4, "A")
    engine.add("b", 3)
    engine.expect(({"a": 4, "b": 3}, "ab", "", {"a": 1}, "a"))
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(engine.scheduler.rows) == 0
    engine.expect(({"a": 5, "b": 4}, "ab", "", {"a": 1}, "a"))


def test_asynchronous_scheduling_plans_ahead_with_the_same_row(make_engine):
    """Step n + 1 is planned before step n has answered. a keeps its row until its last answer."""
    engine = make_engine(step_tokens=8, pipeline=1)
    engine.add("a", 5, "A", max_tokens=2)
    engine.add("b", 6, "B")
    engine.expect(
        ({"a": 5}, "a", "b", {"a": 1}, "a"),
        ({"a": 1, "b": 6}, "ab", "", {"a": 1, "b": 2}, "b"),
        ({"b": 1}, "ab", "", {"a": 1, "b": 2}, ""),
        ({"b": 1}, "b", "", {"b": 2}, ""),
    )


@pytest.mark.parametrize("pipeline", [1, 2])
def test_stages_hold_a_row_until_its_last_step_has_answered(make_engine, pipeline):
    """With one seat, b waits while steps of a are in flight. On every stage, the steps of b come after those of a."""
    engine = make_engine(step_tokens=8, max_num_seqs=1, stages=2, pipeline=pipeline)
    engine.add("a", 5, "A", max_tokens=2)
    engine.add("b", 6, "B")
    lines = [engine.step() for _ in range(8)]
    scheduled = [line[0] for line in lines if line[0]]
    assert scheduled[:3] == [{"a": 5}, {"a": 1}, {"b": 6}]
    assert all(line[3] in ({"a": 1}, {"b": 1}, {}) for line in lines)
    # A request's next token waits until the last stage has sampled the previous one.
    assert lines[1][0] == {}


def test_base_requests_alone_have_an_empty_plan(make_engine):
    engine = make_engine(step_tokens=8)
    engine.add("a", 12)
    engine.expect(
        ({"a": 8}, "a", "", {}, ""),
        ({"a": 4}, "a", "", {}, ""),
    )


def test_tokens_computed_elsewhere_do_not_count_as_read(make_engine):
    """If a request has keys and values but no vectors, no generator has read those tokens."""
    engine = make_engine()
    engine.add("a", 8, "A", instruction=4)
    request = engine.scheduler.requests["a"]
    assert engine.scheduler._reserve_prefill_lookahead(request, 0, 8) == 8
    assert engine.scheduler._reserve_prefill_lookahead(request, 4, 4) == 0
