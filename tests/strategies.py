"""Hypothesis strategies for random scenarios."""

from typing import Any

from hypothesis import strategies as st


def weighted(weights: dict[st.SearchStrategy[Any], int]) -> st.SearchStrategy[Any]:
    """One of these strategies, drawn by weight; `one_of` counts a repeated strategy only once."""
    return st.sampled_from([one for one, weight in weights.items() for _ in range(weight)]).flatmap(lambda one: one)
