"""Conversations of random tokens, for adapters that mark their turns."""

import torch

USER, ASSISTANT = [500, 501], [502, 503]
MARKERS = {"instruction_start_tokens": USER, "instruction_end_tokens": ASSISTANT}
# Random tokens are below these.
VOCABULARY = 500


def conversation(base: int, *turns: int, seed: int = 0) -> list[int]:
    """Token ids: so many base tokens, then messages of so many tokens and answers, in turns, from a user's first."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, VOCABULARY, (base,), generator=random).tolist()
    for number, length in enumerate(turns):
        words = torch.randint(10, VOCABULARY, (length,), generator=random).tolist()
        tokens += words if number % 2 else [*USER, *words, *ASSISTANT]
    return tokens


def asked(*conversations: list[int]) -> list[dict[str, list[int]]]:
    """Prompts as `LLM.generate` takes them."""
    return [{"prompt_token_ids": tokens} for tokens in conversations]
