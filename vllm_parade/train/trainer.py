# SPDX-License-Identifier: Apache-2.0
"""The training loop, and answers of a trained or bare model for scoring."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_parade.train.data import Encoded, collate, encode_prompt, length_sorted_batches, pad_left
from vllm_parade.tuner import ParadeModel

__all__ = ["TrainSettings", "answer", "choose", "mean_loss", "train"]


@dataclass(frozen=True)
class TrainSettings:
    """How an adapter is trained: AdamW, linear decay after a warm-up, the checkpoint of the lowest dev loss."""

    steps: int = 300
    """Optimiser steps, a batch each."""
    batch_size: int = 32
    """Training pairs a step."""
    lr: float = 5e-3
    """Highest learning rate."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises."""
    eval_every: int = 50
    """Steps between two looks at the dev loss."""
    seed: int = 0
    """Of the order of the training pairs."""


def train(
    model: ParadeModel, pairs: Sequence[Encoded], dev: Sequence[Encoded], settings: TrainSettings, pad_id: int
) -> tuple[float, int]:
    """Train `model`'s generators and leave the best checkpoint in them.

    Returns:
        The lowest dev loss and the step at which it was seen.
    """
    parameters = list(model.generators.parameters())
    # No weight decay: it would pull the bias from one, the identity, to zero.
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, settings))
    batches, start = _endless(pairs, settings), time.monotonic()
    best: tuple[float, int, dict[str, Tensor]] = (float("inf"), 0, {})
    for step in range(1, settings.steps + 1):
        model.train()
        loss = _loss(model, next(batches), pad_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % settings.eval_every and step < settings.steps:
            continue
        dev_loss = mean_loss(model, dev, pad_id)
        if dev_loss < best[0]:
            best = dev_loss, step, {name: value.clone() for name, value in model.generators.state_dict().items()}
        seconds = time.monotonic() - start
        print(f"step {step:5d}  loss {loss.item():.4f}  dev loss {dev_loss:.4f}  {seconds:.0f} s", flush=True)
    if not best[2]:
        raise RuntimeError(f"the dev loss was never a number in {settings.steps} steps; try a lower learning rate")
    model.generators.load_state_dict(best[2])
    return best[0], best[1]


@torch.no_grad()
def mean_loss(model: ParadeModel, pairs: Sequence[Encoded], pad_id: int, batch_size: int = 128) -> float:
    """Mean loss of a response token over all `pairs`."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in length_sorted_batches(pairs, batch_size):
        count = sum(len(pair.response) for pair in batch)
        total += _loss(model, batch, pad_id).item() * count
        tokens += count
    return total / tokens


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 256) -> list[str]:
    """Greedy answers of a `ParadeModel` or a bare Hugging Face model, in the order of `prompts`."""
    answers: dict[int, str] = {}
    for indices, batch in _prompt_batches(model, tokenizer, prompts, batch_size):
        output = _generate(model, tokenizer, batch, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update(zip(indices, texts, strict=True))
    return [answers[index].strip() for index in range(len(prompts))]


def choose(
    model: Any, tokenizer: Any, prompts: Sequence[str], choices: Sequence[str], batch_size: int = 256
) -> list[str]:
    """For each prompt, the choice whose first token the model gives the largest logit at the answer's first place."""
    first = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
    if len(set(first)) < len(first):
        raise ValueError(f"choices {', '.join(choices)} begin with the same token; the first token tells nothing")
    chosen: dict[int, int] = {}
    for indices, batch in _prompt_batches(model, tokenizer, prompts, batch_size):
        kwargs = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        best = _generate(model, tokenizer, batch, **kwargs).logits[0][:, first].argmax(dim=1)
        chosen.update(zip(indices, best.tolist(), strict=True))
    return [choices[chosen[index]] for index in range(len(prompts))]


def _learning_rate(step: int, settings: TrainSettings) -> float:
    warmup = max(1, round(settings.warmup * settings.steps))
    return min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))


def _endless(pairs: Sequence[Encoded], settings: TrainSettings) -> Iterator[list[Encoded]]:
    order = random.Random(settings.seed)
    while True:
        yield from length_sorted_batches(pairs, settings.batch_size, order)


def _loss(model: ParadeModel, batch: Sequence[Encoded], pad_id: int) -> Tensor:
    return model(**collate(batch, pad_id, _device(model)), use_cache=False).loss


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _prompt_batches(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Prompts of like lengths together, with their places in `prompts`."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, pad_left([encoded[index] for index in indices], tokenizer.pad_token_id, _device(model))


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, batch: dict[str, Tensor], **kwargs: Any) -> Any:
    model.eval()
    return model.generate(**batch, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id, **kwargs)
