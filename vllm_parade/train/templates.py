# SPDX-License-Identifier: Apache-2.0
"""The user's turn for each task in the paper's wording, and the templates around it.

An adapter answers well only to the wording it was trained on, so training, demo and benchmarks share these functions.
"""

from collections.abc import Callable
from typing import Any

__all__ = [
    "SST2_ANSWERS",
    "TEMPLATES",
    "boolq_prompt",
    "e2e_prompt",
    "rte_prompt",
    "sst2_prompt",
    "wikisql_prompt",
]

SST2_ANSWERS = ("negative", "positive")
"""The expected answers, indexed by SST-2's label."""

LLAMA2_SYSTEM = "You are a helpful, respectful and honest assistant."


def sst2_prompt(sentence: str) -> str:
    """SST-2: one sentence of a film review. The answer is one of `SST2_ANSWERS`."""
    return f"{sentence}\nThe sentiment of the given sentence is:"


def rte_prompt(premise: str, hypothesis: str) -> str:
    """RTE: does the first sentence entail the second? The answer is yes or no."""
    question = "Are sentence 1 and sentence 2 have entailment relation or not?"
    return f"sentence 1: {premise}\nsentence 2: {hypothesis}\n{question}"


def boolq_prompt(passage: str, question: str) -> str:
    """BoolQ: a question about a passage. The answer is yes or no."""
    return f"Reference document:\n{passage}\nQuestion:\n{question}"


def e2e_prompt(reference: str) -> str:
    """E2E: a meaning representation, `name[Blue Spice], area[riverside]`. The answer is a sentence or two."""
    return f"Reference:\n{reference}\nGenerate a customer review following the given reference."


def wikisql_prompt(query: str, table: str) -> str:
    """WikiSQL: a question about a table. The answer is SQL."""
    return (
        f"Answer the following query by writing a SQL query on the given table:\n{query}\nTable information:\n{table}."
    )


def _chat(tokenizer: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _llama2(tokenizer: Any, prompt: str) -> str:
    return f"{tokenizer.bos_token}[INST] <<SYS>>\n{LLAMA2_SYSTEM}\n<</SYS>>\n\n{prompt} [/INST]"


def _plain(tokenizer: Any, prompt: str) -> str:
    return f"{tokenizer.bos_token or ''}{prompt}\n"


# Each template renders a prompt up to the start of the answer, as text with special tokens spelt out: the tokenizer's
# chat template with the prompt as the only user message, the paper's, or only a begin-of-sequence token and a newline.
TEMPLATES: dict[str, Callable[[Any, str], str]] = {"chat": _chat, "llama2": _llama2, "plain": _plain}
