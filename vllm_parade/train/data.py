# SPDX-License-Identifier: Apache-2.0
"""Examples as token ids. The prompt is rendered exactly as the server renders it; it is the instruction."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_parade.train.tasks import Example
from vllm_parade.train.templates import TEMPLATES

__all__ = ["Collator", "encode", "encode_prompt", "pad_left"]

IGNORED_LABEL = -100


def encode_prompt(tokenizer: Any, prompt: str, template: str = "chat") -> list[int]:
    """Token ids of `prompt` in its template, up to the start of the answer."""
    return tokenizer(TEMPLATES[template](tokenizer, prompt), add_special_tokens=False)["input_ids"]


def encode(
    tokenizer: Any, examples: Iterable[Example], template: str = "chat", max_length: int | None = None
) -> list[dict[str, list[int]]]:
    """Encode one training pair per response: `input_ids` and `labels`, where the prompt's labels are ignored.

    Each response ends with the end-of-sequence token. Pairs longer than `max_length` tokens are left out.
    """
    pairs = []
    for example in examples:
        prompt = encode_prompt(tokenizer, example.prompt, template)
        for response in example.responses:
            answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if max_length is None or len(prompt) + len(answer) <= max_length:
                pairs.append({"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer})
    return pairs


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
