"""Questions and right answers for tests of the application, sent concurrently with the official client."""

import asyncio
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import openai

from tests.engines import prompts

REPLICA = "x-parade-replica"
# An answer takes seconds; after this time it counts as lost.
TIMEOUT_S = 120
BASE = "base"
NAMES = ["strong", "rank8", "routing", "last"]
# Name of an adapter that is loaded while the application runs.
LATE = "strong2"
VOCABULARY = 512
LENGTHS = [5, 40, 17, 64, 9, 33, 25, 50, 12, 28, 7, 45]
# Tokens of an answer that is long enough for the cluster to change before it ends.
LONG = 240
# Two tokens closer than this in log-probability may swap ranks in another batch.
NEAR_TIE = 1e-4

# (model, prompt, tokens to answer)
Question = tuple[str, list[int], int]


def _questions(models: list[str], count: int, seed: int, tokens: int) -> list[Question]:
    asked = prompts(list(islice(cycle(LENGTHS), count)), seed=seed, vocab=VOCABULARY)
    return [(model, one["prompt_token_ids"], tokens) for model, one in zip(cycle(models), asked, strict=False)]


MIXED = _questions([BASE, *NAMES], 60, seed=80, tokens=8)
STREAMS = _questions([*NAMES, BASE], 30, seed=81, tokens=LONG)
PLAIN = _questions([*NAMES, BASE], 6, seed=82, tokens=LONG)
FRESH = _questions([LATE], 20, seed=83, tokens=32)
# MESSAGES as rendered by the tokenizer's chat template.
CHAT: Question = (NAMES[0], [1, 100, 200, 300, 400, 2], 8)
MESSAGES: Any = [{"role": "user", "content": "w100 w200 w300 w400"}]


@dataclass(frozen=True)
class Right:
    """The right answer to a question."""

    tokens: list[int]
    clear: int
    """Tokens before the first near tie."""

    @classmethod
    def of(cls, completion: Any) -> "Right":
        """From an engine's completion with two log-probabilities per token."""
        best = [sorted((one.logprob for one in step.values()), reverse=True) for step in completion.logprobs]
        ties = (place for place, (first, second, *_) in enumerate(best) if first - second < NEAR_TIE)
        return cls(list(completion.token_ids), next(ties, len(best)))

    def begins_with(self, tokens: list[int]) -> bool:
        """Whether these are the first tokens of the answer, up to its first near tie."""
        return tokens[: self.clear] == self.tokens[: len(tokens)][: self.clear]

    def equals(self, tokens: list[int]) -> bool:
        """Whether these are the tokens of the answer, compared up to its first near tie."""
        return len(tokens) == len(self.tokens) and self.begins_with(tokens)


class Answer:
    """The result of a question: replica, tokens and error."""

    replica = ""
    error: Exception | None = None

    def __init__(self) -> None:
        self.tokens: list[int] = []


def check(asked: list[Question], answers: list[Answer], right: dict[str, Right]) -> None:
    """Assert that every question has its right answer."""
    for question, answer in zip(asked, answers, strict=True):
        assert answer.error is None, f"{question[0]}: {answer.error}"
        assert right[str(question)].equals(answer.tokens), question[0]


def together(url: str, asked: list[Question], at_once: int = 99) -> list[Answer]:
    """Answers to all questions, at most `at_once` in flight; every third is streamed."""
    answers = [Answer() for _ in asked]
    pairs = [(question, number % 3 == 0) for number, question in enumerate(asked)]
    asyncio.run(ask_all(url, pairs, answers, at_once))
    return answers


async def ask_all(url: str, asked: list[tuple[Question, bool]], answers: list[Answer], at_once: int = 99) -> None:
    """Ask all questions, at most `at_once` in flight; the flag of each says whether it is streamed."""
    room = asyncio.Semaphore(at_once)

    async def one(client: openai.AsyncOpenAI, question: Question, stream: bool, answer: Answer) -> None:
        async with room:
            await _ask(client, question, stream, answer)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        await asyncio.gather(*(one(client, *pair, answer) for pair, answer in zip(asked, answers, strict=True)))


async def _ask(client: openai.AsyncOpenAI, question: Question, stream: bool, answer: Answer) -> None:
    model, prompt, tokens = question
    options: dict[str, Any] = {"extra_body": {"return_token_ids": True, "ignore_eos": True}, "stream": stream}
    create = client.completions.with_raw_response.create
    try:
        response = await create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, **options)
        answer.replica = response.headers[REPLICA]
        parsed: Any = response.parse()
        if stream:
            async for chunk in parsed:
                answer.tokens += [token for choice in chunk.choices for token in choice.token_ids or []]
        else:
            answer.tokens = parsed.choices[0].token_ids
    except openai.APIError as error:
        answer.error = error
