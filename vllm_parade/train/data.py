# SPDX-License-Identifier: Apache-2.0
"""Examples as token ids. The prompt is rendered exactly as the server renders it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_parade.adapter.turns import TurnMarkers, find_turns
from vllm_parade.train.command import naming
from vllm_parade.train.messages import Message, answer_span, render_ids
from vllm_parade.train.tasks import Example
from vllm_parade.train.templates import TEMPLATES

__all__ = ["Collator", "encode", "encode_prompt", "pad_left"]

IGNORED_LABEL = -100


def encode_prompt(tokenizer: Any, prompt: str | tuple[Message, ...], template: str = "chat") -> list[int]:
    """Token ids of `prompt`, a user's turn or a conversation, in its template, up to the start of the answer.

    Raises:
        ValueError: a conversation without the chat template, or one that the chat template refuses.
    """
    if not isinstance(prompt, str):
        if template != "chat":
            raise ValueError(f"a conversation has no template {template}; give --template chat")
        return render_ids(tokenizer, prompt)
    return tokenizer(TEMPLATES[template](tokenizer, prompt), add_special_tokens=False)["input_ids"]


def encode(
    tokenizer: Any,
    examples: Iterable[Example],
    template: str = "chat",
    max_length: int | None = None,
    markers: TurnMarkers | None = None,
) -> list[dict[str, list[int]]]:
    """Encode one training pair per response: `input_ids` and `labels`, where the prompt's labels are ignored.

    Each response ends with the end-of-sequence token. Pairs longer than `max_length` tokens are left out. With
    `markers`, earlier answers of a conversation have labels too, each up to its end-of-turn token.

    Raises:
        ValueError: names the example whose prompt cannot be rendered, or whose answers do not follow an instruction.
    """
    pairs, special = [], set(tokenizer.added_tokens_decoder) if markers else set()
    for example in examples:
        with naming(f"{example.where or 'an example'}:"):
            prompt = encode_prompt(tokenizer, example.prompt, template)
            labels = [IGNORED_LABEL] * len(prompt)
            if markers and not isinstance(example.prompt, str):
                labels = _earlier_answers(tokenizer, example.prompt, prompt, markers, special)
            for response in example.responses:
                answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                pair = {"input_ids": prompt + answer, "labels": labels + answer}
                if markers:
                    _check_answers(pair, markers)
                if max_length is None or len(prompt) + len(answer) <= max_length:
                    pairs.append(pair)
    return pairs


def _earlier_answers(
    tokenizer: Any, messages: tuple[Message, ...], ids: list[int], markers: TurnMarkers, special: set[int]
) -> list[int]:
    """Labels of a rendered conversation's answers and their end-of-turn tokens."""
    labels = [IGNORED_LABEL] * len(ids)
    starts = [turn.start for turn in find_turns(ids, markers)]
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start, end = answer_span(tokenizer, messages, index, ids)
        # A template may put a blank before the end-of-turn token; where it has none, the next turn begins.
        limit = next((turn for turn in starts if turn >= end), len(ids))
        end = next((position + 1 for position in range(end, limit) if ids[position] in special), end)
        labels[start:end] = ids[start:end]
    return labels


def _check_answers(pair: dict[str, list[int]], markers: TurnMarkers) -> None:
    """Refuse labels before the first turn, which no vectors scale, and in instructions, which the generators read."""
    turns = find_turns(pair["input_ids"], markers)
    for start, end in ((0, turns[0].start), *turns):
        for position in range(start, end):
            if pair["labels"][position] != IGNORED_LABEL:
                raise ValueError(
                    f"the answer at token {position} does not begin after an instruction's end; a question must come "
                    "before every answer, no message may hold the template's special tokens, and the template must be "
                    "the one of the markers"
                )


@dataclass(frozen=True)
class Collator:
    """Pads pairs on the right. Returns input_ids, attention_mask and labels, each [batch, tokens]."""

    pad_id: int

    def __call__(self, pairs: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(pair["input_ids"]) for pair in pairs)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for pair in pairs:
            length, padding = len(pair["input_ids"]), longest - len(pair["input_ids"])
            rows["input_ids"].append(pair["input_ids"] + [self.pad_id] * padding)
            rows["attention_mask"].append([1] * length + [0] * padding)
            rows["labels"].append(pair["labels"] + [IGNORED_LABEL] * padding)
        return {name: torch.tensor(values) for name, values in rows.items()}


def pad_left(prompts: Sequence[list[int]], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Pad prompts on the left, for generation. Returns input_ids and attention_mask, each [batch, tokens]."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
