# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_parade.request import IDENTITY_ROW
from vllm_parade.scheduler import RowPool


def test_the_identity_is_never_handed_out():
    pool = RowPool(4)
    rows = {pool.allocate(name, running={"a", "b", "c"}) for name in "abc"}
    assert rows == {1, 2, 3}
    assert IDENTITY_ROW not in rows
    assert len(pool) == 3


def test_a_row_is_kept_until_it_is_freed():
    pool = RowPool(3)
    row = pool.allocate("a", running={"a"})
    pool.allocate("b", running={"a", "b"})
    assert pool.row("a") == row
    pool.free("a")
    assert "a" not in pool
    assert "b" in pool
    assert pool.allocate("c", running={"b", "c"}) == row


def test_freeing_what_has_no_row_changes_nothing():
    pool = RowPool(2)
    pool.free("a")
    assert pool.allocate("b", running={"b"}) == 1
    pool.free("a")
    assert pool.row("b") == 1


def test_a_second_row_for_one_request_is_a_bug():
    pool = RowPool(3)
    pool.allocate("a", running={"a"})
    with pytest.raises(AssertionError, match="has a row already"):
        pool.allocate("a", running={"a"})


def test_the_oldest_row_of_a_request_that_is_not_running_is_taken():
    pool = RowPool(4)
    rows = {name: pool.allocate(name, running={"a", "b", "c"}) for name in "abc"}
    assert pool.allocate("d", running={"b", "d"}) == rows["a"]
    assert "a" not in pool
    assert pool.row("b") == rows["b"]
    assert pool.row("c") == rows["c"]


def test_clear_frees_all():
    pool = RowPool(3)
    for name in "ab":
        pool.allocate(name, running={"a", "b"})
    pool.clear()
    assert len(pool) == 0
    assert {pool.allocate(name, running={"c", "d"}) for name in "cd"} == {1, 2}


@given(st.lists(st.tuples(st.sampled_from(["run", "preempt", "finish"]), st.integers(0, 9))))
def test_running_requests_always_have_different_rows(events):
    """Whatever happens: 3 rows, at most 3 requests running, each with its own row, never the identity."""
    pool, running = RowPool(4), set()
    for event, number in events:
        name = str(number)
        if event == "run" and len(running | {name}) <= 3:
            running.add(name)
            if name not in pool:
                pool.allocate(name, running)
        elif event == "preempt":
            running.discard(name)
        elif event == "finish":
            running.discard(name)
            pool.free(name)
        rows = [pool.row(name) for name in running]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= {1, 2, 3}
        assert len(pool) <= 3
