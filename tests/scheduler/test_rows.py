# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_parade.request import IDENTITY_ROW
from vllm_parade.scheduler import RowCache

A, B, C, D = (("adapter", digest) for digest in "abcd")


@pytest.fixture
def rows():
    """3 rows and the identity."""
    return RowCache(4)


def test_the_identity_is_never_handed_out(rows):
    handed = {rows.allocate(key[1], key) for key in (A, B, C)}
    assert handed == {1, 2, 3}
    assert IDENTITY_ROW not in handed
    assert len(rows) == 3


def test_a_row_is_found_after_its_request(rows):
    row = rows.allocate("1", A)
    rows.release("1")
    assert A in rows
    assert rows.held("1") == []
    assert rows.acquire("2", A) == row
    assert rows.held("2") == [row] == [rows.row("2", A)]


def test_a_row_is_held_until_the_last_holder_leaves(rows):
    row = rows.allocate("1", A)
    rows.acquire("2", A)
    rows.release("1")
    assert len(rows) == 1
    for name, key in (("3", B), ("4", C)):
        assert rows.allocate(name, key) != row
        rows.release(name)
    assert rows.allocate("5", D) != row
    assert A in rows


def test_the_least_recently_used_idle_row_is_taken(rows):
    taken = {key: rows.allocate(key[1], key) for key in (A, B, C)}
    for name in "abc":
        rows.release(name)
    rows.acquire("again", A)
    rows.release("again")
    assert rows.allocate("d", D) == taken[B]
    assert B not in rows
    assert A in rows
    assert C in rows
    assert (rows.hits, rows.misses, rows.evictions) == (1, 4, 1)


def test_releasing_what_holds_nothing_changes_nothing(rows):
    rows.release("1")
    rows.allocate("2", A)
    rows.release("1")
    assert rows.holds("2", A)


def test_two_holds_on_one_row_by_one_request_are_a_bug(rows):
    rows.allocate("1", A)
    with pytest.raises(AssertionError, match="already"):
        rows.acquire("1", A)


def test_a_request_holds_the_rows_of_two_turns_at_their_border(rows):
    first, second = rows.allocate("1", A), rows.allocate("1", B)
    assert rows.held("1") == [first, second]
    assert (len(rows), rows.available, rows.num_holders) == (2, 1, 1)
    rows.pass_by("1", A)
    assert rows.held("1") == [second]
    rows.release("1")
    assert (len(rows), rows.available, rows.num_holders) == (0, 3, 0)


def test_rows_of_passed_turns_are_evicted_first(rows):
    taken = {key: rows.allocate("1", key) for key in (A, B)}
    other = rows.allocate("2", C)
    rows.release("2")
    rows.pass_by("1", A)
    rows.release("1")
    assert [rows.allocate(name, ("adapter", name)) for name in "345"] == [taken[A], other, taken[B]]


def test_two_rows_for_one_instruction_are_a_bug(rows):
    rows.allocate("1", A)
    with pytest.raises(AssertionError, match="has a row already"):
        rows.allocate("2", A)


def test_what_is_forgotten_is_kept_by_its_holders_alone(rows):
    row = rows.allocate("1", A)
    rows.allocate("2", B)
    rows.release("2")
    rows.forget()
    assert A not in rows
    assert B not in rows
    assert rows.held("1") == [row]
    assert rows.allocate("3", A) != row
    rows.release("1")
    # The old row is free. The new row still belongs to A.
    assert {rows.allocate("4", B), rows.allocate("5", C)} == {1, 2, 3} - set(rows.held("3"))


EVENTS = st.tuples(st.sampled_from(["run", "leave", "forget"]), st.integers(0, 9), st.integers(0, 5))


@given(st.lists(EVENTS))
def test_a_running_request_has_the_row_of_its_instruction(events):
    """3 rows, at most 3 running requests. After any events, two requests share a row exactly if they have the same
    instruction and no reset lies between them."""
    rows, running, era = RowCache(4), {}, 0
    for event, number, digest in events:
        name, key = str(number), ("adapter", str(digest))
        if event == "run" and name not in running and len(running) < 3:
            (rows.acquire if key in rows else rows.allocate)(name, key)
            running[name] = (era, key)
        elif event == "leave":
            running.pop(name, None)
            rows.release(name)
        elif event == "forget":
            rows.forget()
            era += 1
        for one, what in running.items():
            assert len(rows.held(one)) == 1
            assert rows.held(one)[0] in {1, 2, 3}
            for other, also in running.items():
                assert (rows.held(one) == rows.held(other)) == (what == also)
