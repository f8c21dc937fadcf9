# SPDX-License-Identifier: Apache-2.0
"""Examples as token ids in padded batches. The instruction is the prompt exactly as the server renders it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_parade.train.tasks import Example

__all__ = ["Encoded", "collate", "encode", "encode_prompt", "length_sorted_batches", "pad_left"]

IGNORED_LABEL = -100
BATCHES_PER_POOL = 20


@dataclass(frozen=True)
class Encoded:
    """Token ids of one training pair; the response ends with the end-of-turn token."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Render `prompt` as the only user message, up to where the model is to answer."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, examples: Iterable[Example]) -> list[Encoded]:
    """One training pair for each response of each example."""
    pairs = []
    for example in examples:
        prompt = encode_prompt(tokenizer, example.prompt)
        for response in example.responses:
            ids = tokenizer(response, add_special_tokens=False)["input_ids"]
            pairs.append(Encoded(prompt, [*ids, tokenizer.eos_token_id]))
    return pairs


def length_sorted_batches(
    pairs: Sequence[Encoded], batch_size: int, order: random.Random | None = None
) -> list[list[Encoded]]:
    """Batches of like lengths; with `order`, shuffled, and sorted only within pools of some batches."""
    pairs, pool_size = list(pairs), len(pairs)
    if order is not None:
        order.shuffle(pairs)
        pool_size = BATCHES_PER_POOL * batch_size
    batches = []
    for start in range(0, len(pairs), pool_size):
        pool = sorted(pairs[start : start + pool_size], key=len)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    if order is not None:
        order.shuffle(batches)
    return batches


def collate(batch: Sequence[Encoded], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Pad on the right: input_ids, attention_mask, instruction_mask and labels, each [batch, tokens]."""
    longest = max(map(len, batch))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "instruction_mask": [], "labels": []}
    for pair in batch:
        prompt, total, padding = len(pair.prompt), len(pair), longest - len(pair)
        rows["input_ids"].append(pair.prompt + pair.response + [pad_id] * padding)
        rows["attention_mask"].append([1] * total + [0] * padding)
        rows["instruction_mask"].append([1] * prompt + [0] * (longest - prompt))
        rows["labels"].append([IGNORED_LABEL] * prompt + pair.response + [IGNORED_LABEL] * padding)
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


def pad_left(prompts: Sequence[list[int]], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Pad on the left, for generation: input_ids and attention_mask, each [batch, tokens]."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
