# SPDX-License-Identifier: Apache-2.0
"""Which adapters read in a step, and which are to be copied for the next ones."""


def test_more_adapters_than_slots_take_turns(make_engine):
    """4 slots: adapters that must be copied join a step while 2 of them are left. A second instruction of the same
    adapter does not wait, nor do adapters that were copied while the step before ran, all 4 of them."""
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
    """4 slots, 2 instructions a step: first come first, no adapter twice, none that the step has or the base model."""
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
    # b reads what a reads; c reads the same under another adapter.
    assert engine.plan.upcoming == {"Y": 1}


def test_the_plan_says_where_each_adapter_is(make_engine):
    """3 slots, an instruction a step. The adapter that has gone longest without being read or coming loses its slot."""
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
        # W takes the slot of Y, which was read before X was named as coming.
        ({"Z": 2}, {"X": 0, "W": 1}),
        ({"X": 0}, {"W": 1, "Y": 2}),
        ({"W": 1}, {"Y": 2, "X": 0}),
        ({"Y": 2}, {"X": 0}),
        ({"X": 0}, {}),
    ]


def test_a_step_without_tokens_copies_nothing(make_engine):
    """Workers pass over it, so what it would have copied would not be where later plans expect it."""
    engine = make_engine(step_tokens=8, pipeline=1, max_num_seqs=1)
    engine.add("a", 4, "X", max_tokens=1)
    engine.step()
    engine.add("b", 4, "Y", max_tokens=1)
    engine.expect(({}, "a", "b", {"a": 1}, ""))
    assert (engine.plan.slots, engine.plan.upcoming) == ({}, {})


def test_decoding_needs_no_slot(make_engine):
    """1 slot, 3 adapters decoding together."""
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
