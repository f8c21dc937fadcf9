# SPDX-License-Identifier: Apache-2.0
"""Effects of sampling parameters on logits, implemented independently for the oracle."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from testing.oracle import Rule


def forbid(tokens: Collection[int], until: int) -> Rule:
    """Forbid these tokens while the answer has fewer than `until` tokens."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return _without(logits, tokens) if len(answer) < until else logits

    return rule


def allow(tokens: Collection[int]) -> Rule:
    """Allow only these tokens."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return _only(logits, tokens)

    return rule


def add(bias: Mapping[int, float]) -> Rule:
    """Add a bias to the logits of some tokens."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return logits.index_add(0, torch.tensor(list(bias)), torch.tensor(list(bias.values())))

    return rule


def avoid(sequences: Sequence[list[int]]) -> Rule:
    """Forbid the last token of a sequence after the sequence's other tokens."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        begun = [one for one in sequences if answer[len(answer) - len(one) + 1 :] == one[:-1]]
        return _without(logits, [one[-1] for one in begun])

    return rule


def penalise(repetition: float, frequency: float, presence: float) -> Rule:
    """Penalise tokens: `repetition` applies to those in prompt or answer, the others to those in the answer."""

    def rule(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
        seen = torch.bincount(torch.tensor([*prompt, *answer]), minlength=len(logits)) > 0
        weighed = torch.where(logits > 0, logits / repetition, logits * repetition)
        counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=len(logits))
        return torch.where(seen, weighed, logits) - frequency * counts - presence * (counts > 0)

    return rule


def one_of(texts: Collection[str], tokenizer: Any) -> Rule:
    """The answer is one of these texts, then EOS. No text may be a prefix of another."""
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
