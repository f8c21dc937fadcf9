# SPDX-License-Identifier: Apache-2.0
"""What sampling parameters do to logits, written down once more for the oracle."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from testing.oracle import Rule


def forbid(tokens: Collection[int], until: int) -> Rule:
    """No answer of fewer than so many tokens has one of these."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return _without(logits, tokens) if len(answer) < until else logits

    return rule


def allow(tokens: Collection[int]) -> Rule:
    """None but these."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return _only(logits, tokens)

    return rule


def add(bias: Mapping[int, float]) -> Rule:
    """Some tokens more or less likely."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return logits.index_add(0, torch.tensor(list(bias)), torch.tensor(list(bias.values())))

    return rule


def avoid(sequences: Sequence[list[int]]) -> Rule:
    """The last token of a sequence does not follow those before it."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        begun = [one for one in sequences if answer[len(answer) - len(one) + 1 :] == one[:-1]]
        return _without(logits, [one[-1] for one in begun])

    return rule


def penalise(repetition: float, frequency: float, presence: float) -> Rule:
    """`repetition` weighs on what stands in prompt or answer, the others on what stands in the answer."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        seen = torch.bincount(torch.tensor([*prompt, *answer]), minlength=len(logits)) > 0
        weighed = torch.where(logits > 0, logits / repetition, logits * repetition)
        counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=len(logits))
        return torch.where(seen, weighed, logits) - frequency * counts - presence * (counts > 0)

    return rule


def one_of(texts: Collection[str], tokenizer: Any) -> Rule:
    """The answer is one of these texts and then ends; none of them begins with another."""
    spelled = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    special = set(tokenizer.all_special_ids)

    @cache
    def follows(said: str) -> set[int]:
        if said in texts:
            return {tokenizer.eos_token_id}
        rest = [text[len(said) :] for text in texts if text.startswith(said)]
        fitting = {token for token, piece in spelled.items() if piece and any(text.startswith(piece) for text in rest)}
        return fitting - special

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return _only(logits, follows("".join(spelled[token] for token in answer)))

    return rule


def _without(logits: torch.Tensor, tokens: Collection[int]) -> torch.Tensor:
    return logits.index_fill(0, torch.tensor(sorted(tokens), dtype=torch.long), -torch.inf)


def _only(logits: torch.Tensor, tokens: Collection[int]) -> torch.Tensor:
    return torch.full_like(logits, -torch.inf).index_copy(
        0, kept := torch.tensor(sorted(tokens), dtype=torch.long), logits[kept]
    )
