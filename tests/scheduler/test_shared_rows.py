# SPDX-License-Identifier: Apache-2.0
"""Tables of steps, as in test_steps: requests with the same instruction and adapter share rows and blocks."""

TOKENS = list(range(13))


def again(engine, name, adapter="C", **options):
    """Add a request whose prompt is TOKENS."""
    engine.add(name, 13, adapter, tokens=TOKENS, **options)


def test_prefix_cache_counts_where_a_row_is(make_engine):
    """b and d repeat the prompts of a and c. Only their last token is computed, and no generator runs."""
    engine = make_engine(step_tokens=64)
    again(engine, "a", adapter=None)
    again(engine, "c")
    engine.expect(({"a": 13, "c": 13}, "ac", "", {"c": 1}, "c"))
    again(engine, "b", adapter=None)
    again(engine, "d")
    engine.expect(({"a": 1, "c": 1, "b": 1, "d": 1}, "acbd", "", {"c": 1, "d": 1}, ""))
    rows = engine.scheduler.rows
    assert (rows.hits, rows.misses, rows.evictions) == (1, 1, 0)


def test_a_row_outlives_its_request(make_engine):
    engine = make_engine(step_tokens=64)
    again(engine, "a", max_tokens=1)
    engine.expect(({"a": 13}, "a", "", {"a": 1}, "a"))
    again(engine, "b")
    engine.expect(({"b": 1}, "b", "", {"b": 1}, ""))


def test_prefix_cache_does_not_count_without_a_row(make_engine):
    """With a single row, b evicts the row of a, so c reads the whole prompt again."""
    engine = make_engine(step_tokens=64, max_num_seqs=1)
    again(engine, "a", max_tokens=1)
    engine.expect(({"a": 13}, "a", "", {"a": 1}, "a"))
    engine.add("b", 5, "B", max_tokens=1)
    engine.expect(({"b": 5}, "b", "", {"b": 1}, "b"))
    again(engine, "c")
    engine.expect(({"c": 13}, "c", "", {"c": 1}, "c"))
    assert not engine.scheduler.requests["c"].skip_reading_prefix_cache
    assert engine.scheduler.rows.evictions == 2


def test_spare_rows_keep_vectors_for_longer(make_engine):
    engine = make_engine(step_tokens=64, max_num_seqs=1, vector_cache=1)
    again(engine, "a", max_tokens=1)
    engine.expect(({"a": 13}, "a", "", {"a": 1}, "a"))
    engine.add("b", 5, "B", max_tokens=1)
    engine.expect(({"b": 5}, "b", "", {"b": 2}, "b"))
    again(engine, "c")
    engine.expect(({"c": 1}, "c", "", {"c": 1}, ""))


def test_siblings_in_one_step_read_their_prompt_once(make_engine):
    """n > 1 sends such requests. They share the full blocks of the first one and compute only their last token."""
    engine = make_engine(step_tokens=64)
    for name in "abc":
        again(engine, name)
    engine.expect(
        ({"a": 13, "b": 1, "c": 1}, "abc", "", {"a": 1, "b": 1, "c": 1}, "a"),
        ({"a": 1, "b": 1, "c": 1}, "abc", "", {"a": 1, "b": 1, "c": 1}, ""),
    )
    engine.abort("a")
    engine.expect(({"b": 1, "c": 1}, "bc", "", {"b": 1, "c": 1}, ""))


def test_a_sibling_of_one_that_waits_waits_too(make_engine):
    """The step has no room for the whole prompt, so neither request starts with a part of it."""
    engine = make_engine(step_tokens=16)
    engine.add("z", 8)
    again(engine, "a")
    again(engine, "b")
    engine.expect(
        ({"z": 8}, "z", "ab", {}, ""),
        ({"z": 1, "a": 13, "b": 1}, "zab", "", {"a": 1, "b": 1}, "a"),
    )


def test_vectors_without_cached_keys_and_values(make_engine):
    """Without prefix caching the model reads the prompt again, in chunks and without a generator."""
    engine = make_engine(step_tokens=16, enable_prefix_caching=False)
    again(engine, "a")
    engine.expect(({"a": 13}, "a", "", {"a": 1}, "a"))
    engine.add("z", 8)
    again(engine, "b")
    engine.expect(
        ({"a": 1, "z": 8, "b": 7}, "azb", "", {"a": 1, "b": 1}, ""),
        ({"a": 1, "z": 1, "b": 6}, "azb", "", {"a": 1, "b": 1}, ""),
    )


def test_another_adapter_shares_nothing(make_engine):
    """An adapter that was loaded again with other content is another adapter."""
    engine = make_engine(step_tokens=64)
    again(engine, "a")
    engine.expect(({"a": 13}, "a", "", {"a": 1}, "a"))
    engine.add("b", 13, "D", tokens=TOKENS)
    engine.expect(({"a": 1, "b": 13}, "ab", "", {"a": 1, "b": 2}, "b"))


def test_after_a_reset_nobody_finds_old_vectors(make_engine):
    """This includes vectors of a request that still runs: they come from the old weights."""
    engine = make_engine(step_tokens=64)
    again(engine, "a")
    engine.expect(({"a": 13}, "a", "", {"a": 1}, "a"))
    engine.scheduler.reset_prefix_cache()
    again(engine, "b")
    engine.expect(({"a": 1, "b": 13}, "ab", "", {"a": 1, "b": 2}, "b"))
