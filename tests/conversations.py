"""Conversations of random tokens, for adapters that mark their turns."""

import torch

USER, ASSISTANT = [500, 501], [502, 503]
MARKERS = {"instruction_start_tokens": USER, "instruction_end_tokens": ASSISTANT}
# Random tokens are below this, markers are not.
VOCABULARY = 500


def conversation(base: int, *turns: int, seed: int = 0) -> list[int]:
    """Token ids: `base` tokens, then user messages and answers in turn, with the lengths in `turns`; a user begins."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, VOCABULARY, (base,), generator=random).tolist()
    for number, length in enumerate(turns):
        words = torch.randint(10, VOCABULARY, (length,), generator=random).tolist()
        tokens += words if number % 2 else [*USER, *words, *ASSISTANT]
    return tokens


def marked_prompts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Random prompts of these lengths; longer prompts contain two turns."""
    found = []
    for number, length in enumerate(lengths):
        answer, message = length // 4, length // 6
        turns = (message, answer, message) if message else ()
        base = length - sum(turns) - (len(USER) + len(ASSISTANT)) * 2 if turns else length
        found.append(conversation(*((base, *turns) if base >= 0 else (length,)), seed=1000 * seed + number))
    return asked(*found)


def asked(*conversations: list[int]) -> list[dict[str, list[int]]]:
    """Prompts in the format of `LLM.generate`."""
    return [{"prompt_token_ids": tokens} for tokens in conversations]
