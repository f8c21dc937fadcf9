# SPDX-License-Identifier: Apache-2.0
"""Turns, compared with a slower implementation of SPEC 2b, and their digests."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_parade.adapter.turns import Turn, TurnMarkers, find_turns, turn_digests

USER, ASSISTANT, END = 1, 2, 3
MARKERS = TurnMarkers(start=(USER,), end=(ASSISTANT,))


def described(tokens, markers):
    """Turns as the specification describes them, position by position."""
    count, start, end = len(tokens), list(markers.start), list(markers.end)
    starts, position = [], 0
    while position < count:
        if tokens[position : position + len(start)] == start:
            starts.append(position)
            position += len(start)
        else:
            position += 1
    turns = []
    for number, begin in enumerate(starts or [0]):
        following = starts[number + 1] if number + 1 < len(starts) else count
        behind = begin + len(start) if starts else 0
        ends = [p + len(end) for p in range(behind, count) if tokens[p : p + len(end)] == end]
        instruction_end = min([*ends[:1], following, count])
        if markers.max_tokens is not None:
            begin = max(begin, instruction_end - markers.max_tokens)
        turns.append(Turn(begin, instruction_end))
    return turns


tokens_of_few_kinds = st.lists(st.integers(1, 4), min_size=1, max_size=40)
marker_tokens = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
any_markers = st.builds(TurnMarkers, marker_tokens, marker_tokens, st.none() | st.integers(1, 12))


@settings(max_examples=500)
@given(tokens_of_few_kinds, any_markers)
def test_turns_are_those_of_the_specification(tokens, markers):
    assert find_turns(tokens, markers) == described(tokens, markers)


@given(tokens_of_few_kinds, any_markers)
def test_instructions_are_not_empty_and_do_not_overlap(tokens, markers):
    turns = find_turns(tokens, markers)
    assert turns
    borders = [position for turn in turns for position in turn]
    assert borders == sorted(borders)
    assert all(turn.start < turn.end for turn in turns)
    assert borders[0] >= 0
    assert borders[-1] <= len(tokens)


@pytest.mark.parametrize(
    ("tokens", "turns"),
    [
        pytest.param([9, USER, 7, ASSISTANT, 8, END], [(1, 4)], id="base tokens before the first turn"),
        pytest.param([USER, 7, ASSISTANT, 8, USER, 7, ASSISTANT], [(0, 3), (4, 7)], id="history"),
        pytest.param([USER, 7, 7, USER, 7, ASSISTANT], [(0, 3), (3, 6)], id="no end before the next start"),
        pytest.param([USER, 7, 7], [(0, 3)], id="no end at all"),
        pytest.param([7, ASSISTANT, 8], [(0, 2)], id="no start"),
        pytest.param([7, 8], [(0, 2)], id="no marker"),
        pytest.param([USER, ASSISTANT, ASSISTANT], [(0, 2)], id="empty message"),
    ],
)
def test_turns_of_a_prompt(tokens, turns):
    assert find_turns(tokens, MARKERS) == turns


def test_an_instruction_keeps_its_last_tokens():
    markers = TurnMarkers((USER,), (ASSISTANT,), max_tokens=3)
    assert find_turns([9, USER, 4, 5, 6, ASSISTANT, 8, USER, ASSISTANT], markers) == [(3, 6), (7, 9)]
    assert find_turns([4, 5, 6, 7], markers) == [(1, 4)]


def test_without_markers_the_prompt_is_one_instruction():
    assert find_turns([USER, 7, ASSISTANT], None) == [(0, 3)]


@given(tokens_of_few_kinds, tokens_of_few_kinds, any_markers)
def test_a_digest_does_not_depend_on_what_follows_its_instruction(tokens, more, markers):
    turns, longer = find_turns(tokens, markers), find_turns(tokens + more, markers)
    digests, later = turn_digests(tokens, turns), turn_digests(tokens + more, longer)
    common = [turn for turn, other in zip(turns, longer, strict=False) if turn == other]
    assert digests[: len(common)] == later[: len(common)]


@given(st.data())
def test_digests_are_equal_only_for_equal_prefixes_and_turns(data):
    read = [data.draw(st.tuples(tokens_of_few_kinds, any_markers)) for _ in range(2)]
    (tokens, turns), (others, other_turns) = [(tokens, find_turns(tokens, markers)) for tokens, markers in read]
    found = [turn_digests(tokens, turns), turn_digests(others, other_turns)]
    for i, digest in enumerate(found[0]):
        for j, other in enumerate(found[1]):
            same = turns[: i + 1] == other_turns[: j + 1] and tokens[: turns[i].end] == others[: other_turns[j].end]
            assert (digest == other) == same


@pytest.mark.parametrize("hostile", [[USER, 7, 7] * 10_667, [USER] * 32_000, [USER, USER, ASSISTANT] * 10_667])
def test_a_hostile_prompt_takes_time_in_proportion_to_its_length(hostile):
    begin = time.perf_counter()
    turns = find_turns(hostile, TurnMarkers((USER, 7), (ASSISTANT, 8)))
    digests = turn_digests(hostile, turns)
    assert len(set(digests)) == len(turns)
    # This takes 20 ms; a quadratic scan takes seconds.
    assert time.perf_counter() - begin < 0.5
