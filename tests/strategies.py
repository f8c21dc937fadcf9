"""What random scenarios are made of."""

from typing import Any

from hypothesis import strategies as st


def weighted(weights: dict[st.SearchStrategy[Any], int]) -> st.SearchStrategy[Any]:
    """One of these strategies, each as often as its weight says; `one_of` would take each once, however often named."""
    return st.sampled_from([one for one, weight in weights.items() for _ in range(weight)]).flatmap(lambda one: one)
