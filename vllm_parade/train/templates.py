"""The user's turn for each task, as the paper words it.

An adapter answers well only to the wording it was trained on, so training, demo and benchmarks all take it from here.
The paper wraps every query in LLaMA-2's template; here the tokenizer's own chat template does that, with these texts
as the content of a single user message (no system message: the template adds the model's default one).
"""

__all__ = ["SST2_ANSWERS", "e2e_prompt", "sst2_prompt"]

SST2_ANSWERS = ("negative", "positive")
"""What the model is to answer, indexed by SST-2's label."""


def sst2_prompt(sentence: str) -> str:
    """SST-2: one sentence of a film review, to be answered with one of `SST2_ANSWERS`."""
    return f"{sentence}\nThe sentiment of the given sentence is:"


def e2e_prompt(reference: str) -> str:
    """E2E: a meaning representation, `name[Blue Spice], area[riverside]`, to be answered with a sentence or two."""
    return f"Reference:\n{reference}\nGenerate a customer review following the given reference."
