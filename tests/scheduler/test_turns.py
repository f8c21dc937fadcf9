# SPDX-License-Identifier: Apache-2.0
"""Tables of steps, as in test_steps: requests under adapters that mark their turns.

Token 1 starts a turn, token 2 ends its instruction, and token 7 is every answer. A block has four tokens.
"""

import pytest

from tests.scheduler.conftest import ANSWER, ASSISTANT, USER

# Turns [6, 12) and [12, 16), each with an instruction of four tokens.
TOKENS = [3, 4, 5, 6, 3, 4, USER, 8, 9, ASSISTANT, ANSWER, ANSWER, USER, 5, 5, ASSISTANT]


def add(engine, name, tokens=TOKENS, adapter="A", **options):
    engine.add(name, len(tokens), adapter, tokens=list(tokens), marked=True, **options)


def test_a_chunk_reads_one_instruction(make_engine):
    """The first chunk has the base tokens and the first turn, the second one the second turn. Borders are where rows
    change."""
    engine = make_engine(step_tokens=64)
    add(engine, "a")
    engine.expect(({"a": 12}, "a", "", {}, "a"))
    assert (engine.plan.rows, engine.plan.borders, engine.plan.readings["a"].offset) == ({}, {"a": (6, 1)}, 6)
    engine.expect(({"a": 4}, "a", "", {"a": 2}, "a"), ({"a": 1}, "a", "", {"a": 2}, ""))
    assert (engine.plan.rows, engine.plan.borders) == ({"a": 2}, {})


def test_base_tokens_are_cut_and_instructions_are_not(make_engine):
    """Steps of five tokens: an instruction of four tokens waits for the next step if fewer are left."""
    engine = make_engine(step_tokens=5)
    add(engine, "a")
    engine.expect(
        ({"a": 5}, "a", "", {}, ""),
        # One base token and the first instruction.
        ({"a": 5}, "a", "", {"a": 1}, "a"),
        # The rest of the turn; the second instruction does not fit.
        ({"a": 2}, "a", "", {}, ""),
        ({"a": 4}, "a", "", {"a": 2}, "a"),
        ({"a": 1}, "a", "", {"a": 2}, ""),
    )


def test_the_next_turn_computes_its_own_tokens(make_engine):
    engine = make_engine(step_tokens=64, vector_cache=4)
    add(engine, "a", max_tokens=6)
    for _ in range(7):
        engine.step()
    assert not engine.scheduler.requests
    add(engine, "b", [*TOKENS, *[ANSWER] * 6, USER, 6, ASSISTANT])
    # 20 of the 22 tokens are in full blocks; they end inside the second turn, whose row is cached.
    engine.expect(({"b": 5}, "b", "", {"b": 3}, "b"))
    assert (engine.plan.rows, engine.plan.borders) == ({"b": 2}, {"b": (2, 3)})
    assert engine.scheduler.rows.misses == 3


@pytest.mark.parametrize(
    ("adapter", "salt", "computed", "shared"),
    [
        pytest.param(None, "", 9, 0, id="base: one block of base tokens"),
        pytest.param("B", "", 9, 4, id="another adapter: the same block"),
        pytest.param("A", "", 1, 6, id="the same adapter: all blocks"),
        pytest.param("A", "x", 13, 0, id="a salt of its own: nothing"),
    ],
)
def test_what_precedes_the_first_turn_is_shared(make_engine, adapter, salt, computed, shared):
    engine = make_engine(step_tokens=64, vector_cache=4)
    add(engine, "a", TOKENS[:12], max_tokens=1)
    engine.step()
    add(engine, "b", [*TOKENS[:12], ANSWER], adapter, salt=salt)
    assert engine.step()[0] == {"b": computed}
    assert engine.scheduler.shared_base_tokens == shared


def test_a_prefix_without_its_vectors_ends_at_the_turns_start(make_engine):
    """It ends at the previous turn's start if a block reaches into that turn and its vectors are gone too."""
    engine = make_engine(step_tokens=64, vector_cache=4)
    add(engine, "a", max_tokens=1)
    engine.step()
    engine.step()
    engine.scheduler.rows.forget()
    add(engine, "b")
    # All 16 tokens are cached, but the second turn starts at 12 and its instruction is read again.
    engine.expect(({"b": 4}, "b", "", {"b": 2}, "b"))
    engine.abort("b")
    engine.scheduler.rows.forget()
    shifted = [3, *TOKENS]
    add(engine, "c", shifted, max_tokens=1)
    engine.step()
    engine.step()
    engine.scheduler.rows.forget()
    add(engine, "d", shifted)
    # The second turn starts at 13: the hit before it ends at 12, inside the first turn. That turn starts at 7, and the
    # hit before it ends at 4.
    assert engine.step()[0] == {"d": 9}


def test_siblings_wait_for_the_one_that_reads(make_engine):
    """b would compute every later turn itself, so it waits while a reads. c passes b, and so does d with one turn."""
    engine = make_engine(step_tokens=64, vector_cache=4)
    add(engine, "a")
    add(engine, "b")
    engine.add("c", 3)
    add(engine, "d", TOKENS[:12])
    engine.expect(
        ({"a": 12, "c": 3, "d": 4}, "acd", "b", {"d": 1}, "a"),
        ({"a": 4, "c": 1, "d": 1, "b": 4}, "acdb", "", {"a": 2, "b": 2, "d": 1}, "a"),
    )
    assert engine.scheduler.rows.misses == 2


@pytest.mark.parametrize(("vector_cache", "computed"), [(0, [4, 1, 3]), (1, [4, 4])])
def test_no_row_to_spare_ends_a_chunk_at_the_border(make_engine, vector_cache, computed):
    """With a single row, a request releases a turn's row before it starts the next turn."""
    engine = make_engine(step_tokens=4, max_num_seqs=1, vector_cache=vector_cache)
    add(engine, "a", [USER, 8, ASSISTANT, ANSWER, ANSWER, USER, 9, ASSISTANT], max_tokens=1)
    assert [engine.step()[0]["a"] for _ in computed] == computed
    assert engine.scheduler.rows.misses == 2


def test_a_running_instruction_does_not_starve(make_engine):
    """Five decoding requests leave three tokens a step. After four steps without room, they leave the six a needs."""
    engine = make_engine(step_tokens=8, max_num_seqs=8)
    for name in "bcdef":
        engine.add(name, 1)
    engine.step()
    add(engine, "a", [USER, 8, ASSISTANT, USER, 9, 9, 9, 9, ASSISTANT])
    decode = dict.fromkeys("bcdef", 1)
    assert [engine.step()[0] for _ in range(6)] == [
        {**decode, "a": 3},
        *[decode] * 4,
        {"b": 1, "c": 1, "a": 6},
    ]


def test_turns_that_are_passed_are_evicted_first(make_engine):
    """Two conversations, three spare rows: the last turn of each stays cached."""
    engine = make_engine(step_tokens=64, max_num_seqs=1, vector_cache=2)
    other = [9, *TOKENS[1:]]
    for name, tokens in (("a", TOKENS), ("b", other)):
        add(engine, name, tokens, max_tokens=1)
        engine.step()
        engine.step()
    misses = engine.scheduler.rows.misses
    for name, tokens in (("c", TOKENS), ("d", other)):
        add(engine, name, [*tokens, ANSWER, USER, 6, ASSISTANT], max_tokens=1)
        engine.step()
    assert engine.scheduler.rows.misses == misses + 2
