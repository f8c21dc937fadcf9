# SPDX-License-Identifier: Apache-2.0
"""An engine that answers without a model, with a prefix cache of whole blocks."""

from types import SimpleNamespace
from typing import Any

from benchmarks.engine import Turn
from benchmarks.models import NUM_MARKER_TOKENS, marker_tokens

BLOCK = 16
ANSWER = 7


class FakeVariant:
    """Answers with equal tokens. A prompt waits one second, plus one for each prompt before it in the call."""

    def __init__(self, name: str = "base", few: tuple[str, ...] = ()) -> None:
        self.name, self.few, self.adapters = name, few, tuple(f"whole {one}" for one in few)
        self.settings = SimpleNamespace(repeats=3)
        self.turn = Turn("")
        self.calls: list[tuple[list[list[int]], list[Any]]] = []
        self.known: list[list[int]] = []
        self.written = 0

    def words(self, length: int) -> list[int]:
        self.written += 1
        return [10 + self.written] * length

    def message(self, length: int) -> list[int]:
        start, end = marker_tokens("tiny").values()
        return [*start, *self.words(length - NUM_MARKER_TOKENS), *end]

    def outputs(self, prompts: list[dict[str, list[int]]], tokens: int, requests: Any) -> list[Any]:
        asked = [prompt["prompt_token_ids"] for prompt in prompts]
        self.calls.append((asked, list(requests)))
        outputs = []
        for number, prompt in enumerate(asked):
            cached = max((common(prompt, known) for known in self.known), default=0)
            outputs.append(
                SimpleNamespace(
                    prompt_token_ids=prompt,
                    num_cached_tokens=cached // BLOCK * BLOCK,
                    metrics=SimpleNamespace(first_token_latency=1.0 + number),
                    outputs=[SimpleNamespace(token_ids=[ANSWER] * tokens)],
                )
            )
        self.known += [[*prompt, *[ANSWER] * (tokens - 1)] for prompt in asked]
        return outputs

    def rows(self) -> None:
        return None

    def cache_tokens(self) -> int:
        return 10_000


def common(some: list[int], others: list[int]) -> int:
    """Number of equal tokens at the start."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(some), len(others)))
