# SPDX-License-Identifier: Apache-2.0
"""Answers of a Hugging Face model, with or without an adapter, for scoring."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_parade.train.data import encode_prompt, pad_left
from vllm_parade.train.tasks import Example, Task

__all__ = ["answer", "choose", "score"]


def score(task: Task, model: Any, tokenizer: Any, examples: Sequence[Example], template: str) -> float:
    """The task's metric in per cent, of the most likely choice if the task has choices, else of greedy answers."""
    prompts = [encode_prompt(tokenizer, example.prompt, template) for example in examples]
    if task.choices:
        return task.metric(choose(model, tokenizer, prompts, task.choices), examples)
    return task.metric(answer(model, tokenizer, prompts, task.max_new_tokens), examples)


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int = 256
) -> list[str]:
    """Greedy answers to prompts of token ids, in the order of `prompts`."""
    answers: dict[int, str] = {}
    for indices, batch in _prompt_batches(model, tokenizer, prompts, batch_size):
        output = _generate(model, tokenizer, batch, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update(zip(indices, texts, strict=True))
    return [answers[index].strip() for index in range(len(prompts))]


def choose(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], choices: Sequence[str], batch_size: int = 256
) -> list[str]:
    """The most likely choice for each prompt, by the logits of the choices' first tokens at the first answer position.

    Raises:
        ValueError: two choices begin with the same token.
    """
    first = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
    if len(set(first)) < len(first):
        raise ValueError(f"choices {', '.join(choices)}: two begin with the same token; give choices that differ there")
    chosen: dict[int, int] = {}
    for indices, batch in _prompt_batches(model, tokenizer, prompts, batch_size):
        kwargs = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        best = _generate(model, tokenizer, batch, **kwargs).logits[0][:, first].argmax(dim=1)
        chosen.update(zip(indices, best.tolist(), strict=True))
    return [choices[chosen[index]] for index in range(len(prompts))]


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _prompt_batches(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of prompts of similar length, with their indices in `prompts`."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, pad_left([prompts[index] for index in indices], tokenizer.pad_token_id, _device(model))


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, batch: dict[str, Tensor], **kwargs: Any) -> Any:
    model.eval()
    return model.generate(**batch, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id, **kwargs)
