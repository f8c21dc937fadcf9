# SPDX-License-Identifier: Apache-2.0
"""Which adapters read instructions in a step, and which are copied for the next steps."""


def test_more_adapters_than_slots_take_turns(make_engine):
    """4 slots: a step admits at most 2 adapters that must be copied. A second instruction of the same adapter does not
    wait. Adapters that were copied during the previous step do not wait either: all 4 read in one step."""
    engine = make_engine(step_tokens=99, max_num_seqs=99, max_parades=4)
    for name, adapter in zip("abcdef", "AABCDE", strict=True):
        engine.add(name, 2, adapter, max_tokens=1)
    engine.expect(
        ({"a": 2, "b": 2, "c": 2}, "abc", "def", {"a": 1, "b": 2, "c": 3}, "abc"),
        ({"d": 2, "e": 2}, "de", "f", {"d": 4, "e": 5}, "de"),
        ({"f": 2}, "f", "", {"f": 6}, "f"),
    )
    for name, adapter in zip("ghijk", "BCDEA", strict=True):
        engine.add(name, 2, adapter, max_tokens=1)
    engine.step()
    assert (list(engine.plan.readings), engine.plan.upcoming) == (["g", "h", "i", "j"], {})
    engine.step()
    assert list(engine.plan.readings) == ["k"]


def test_one_slot_is_enough(make_engine):
    engine = make_engine(max_parades=1)
    for name in "abc":
        engine.add(name, 2, name.upper(), max_tokens=1)
    for name in "abc":
        engine.step()
        assert ("".join(engine.plan.readings), engine.plan.slots) == (name, {name.upper(): 0})
        assert engine.plan.upcoming == {}


def test_plan_names_the_adapters_that_come_next(make_engine):
    """4 slots, 2 instructions a step. Upcoming adapters are listed in order of arrival, each once.

    Adapters of the step and the base model are left out.
    """
    engine = make_engine(step_tokens=8, max_num_seqs=8, max_parades=4)
    for name, adapter in zip("abcdefgh", ["X", "X", "Y", None, "Z", "Y", "W", "V"], strict=True):
        engine.add(name, 4, adapter, max_tokens=1)
    plans = []
    for _ in range(4):
        engine.step()
        plans.append(("".join(engine.plan.readings), "".join(engine.plan.upcoming)))
    assert plans == [("ab", "YZW"), ("c", "ZWV"), ("ef", "WV"), ("gh", "")]


def test_what_finds_its_vectors_needs_no_adapter_soon(make_engine):
    engine = make_engine(step_tokens=4, vector_cache=2)
    for name in "abc":
        engine.add(name, 4, "X" if name < "c" else "Y", tokens=[1, 2, 3, 4], max_tokens=1)
    engine.step()
    # b has the instruction and adapter of a; c has the same instruction under another adapter.
    assert engine.plan.upcoming == {"Y": 1}


def test_the_plan_says_where_each_adapter_is(make_engine):
    """3 slots, one instruction a step. The adapter that was least recently active or upcoming loses its slot."""
    engine = make_engine(step_tokens=4, max_parades=3)
    for name, adapter in zip("abcdefg", "XYZXWYX", strict=True):
        engine.add(name, 4, adapter, max_tokens=1)
    plans = []
    for _ in range(7):
        engine.step()
        plans.append((engine.plan.slots, engine.plan.upcoming))
    assert plans == [
        ({"X": 0}, {"Y": 1, "Z": 2}),
        ({"Y": 1}, {"Z": 2, "X": 0}),
        # W takes the slot of Y: Y was active before X became upcoming.
        ({"Z": 2}, {"X": 0, "W": 1}),
        ({"X": 0}, {"W": 1, "Y": 2}),
        ({"W": 1}, {"Y": 2, "X": 0}),
        ({"Y": 2}, {"X": 0}),
        ({"X": 0}, {}),
    ]


def test_a_step_without_tokens_copies_nothing(make_engine):
    """Workers skip such a step, so later plans would miss the adapters that it should copy."""
    engine = make_engine(step_tokens=8, pipeline=1, max_num_seqs=1)
    engine.add("a", 4, "X", max_tokens=1)
    engine.step()
    engine.add("b", 4, "Y", max_tokens=1)
    engine.expect(({}, "a", "b", {"a": 1}, ""))
    assert (engine.plan.slots, engine.plan.upcoming) == ({}, {})


def test_decoding_needs_no_slot(make_engine):
    """1 slot; requests of 3 adapters decode together."""
    engine = make_engine(max_parades=1)
    for name in "abc":
        engine.add(name, 2, name.upper())
    rows = {"a": 1, "b": 2, "c": 3}
    engine.expect(
        ({"a": 2}, "a", "bc", {"a": 1}, "a"),
        ({"a": 1, "b": 2}, "ab", "c", {"a": 1, "b": 2}, "b"),
        ({"a": 1, "b": 1, "c": 2}, "abc", "", rows, "c"),
        ({"a": 1, "b": 1, "c": 1}, "abc", "", rows, ""),
    )
