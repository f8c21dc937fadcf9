# SPDX-License-Identifier: Apache-2.0
"""Measures trained runs: the tasks' metrics, and how much PARADE's vectors depend on the prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.data import Batches
from benchmarks.study.generators import Generators
from benchmarks.study.stack import Stack
from benchmarks.study.tables import STRANGERS
from vllm_parade.inspect import prompt_dependence
from vllm_parade.train.data import pad_left
from vllm_parade.train.tasks import Task

# Prompts per pass (each answered once per run), and maximum tokens of an answer: 99 of 100 responses fit.
PROMPTS, NEW_TOKENS = 64, 48


class Measurement:
    """Measures a group's runs. Every result is a list with one entry per run."""

    def __init__(self, stack: Stack, batches: Batches, tokenizer: Any) -> None:
        self.stack, self.batches, self.tokenizer = stack, batches, tokenizer
        self.base, self.data, self.runs = stack.base, batches.data, len(stack.runs)

    @torch.no_grad()
    def results(self) -> dict[str, list[Any]]:
        """Each task's metric; for PARADE also dependence on the prompt, and metric and loss with swapped vectors."""
        found: dict[str, list[Any]] = {name: self._scores(name) for name in self.data}
        if isinstance(self.stack.method, Generators):
            found |= {f"{name}_swapped": self._scores(name, shift=1) for name in self.data}
            found |= self._dependence(self.stack.method)
            found[STRANGERS] = self._added_loss()
        return found

    def _scores(self, name: str, shift: int = 0) -> list[float]:
        data, answers = self.data[name], [[""] * len(self.data[name].test) for _ in range(self.runs)]
        order = sorted(range(len(data.prompts)), key=lambda place: len(data.prompts[place]))
        find = self._choose if data.task.choices else self._answer
        for start in range(0, len(order), PROMPTS):
            places = order[start : start + PROMPTS]
            texts = find(data.task, [data.prompts[place] for place in places], shift)
            for number, text in enumerate(texts):
                run, row = divmod(number, len(places))
                answers[run][places[row]] = text
        return [data.task.metric(texts, data.test) for texts in answers]

    def _choose(self, task: Task, prompts: list[list[int]], shift: int) -> list[str]:
        """The most likely choice after each prompt, ordered by run."""
        first = [self.tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in task.choices]
        logits = self.base.lm_head(self._before_answers(prompts, shift))[..., first]
        return [task.choices[place] for place in logits.argmax(dim=-1).flatten().tolist()]

    def _answer(self, task: Task, prompts: list[list[int]], shift: int) -> list[str]:
        """The generated answer to each prompt, ordered by run."""
        batch = pad_left(prompts * self.runs, self.tokenizer.pad_token_id, self.stack.device)
        self.stack.read(self.batches.instruction(batch["attention_mask"].bool()), shift)
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}
        output = self.base.generate(**batch, max_new_tokens=min(NEW_TOKENS, task.max_new_tokens), **options)
        texts = self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _dependence(self, generators: Generators) -> dict[str, list[Any]]:
        """How much each run's vectors differ between the prompts of each task, and between those of all tasks."""
        found = {name: self._vectors(generators, name) for name in self.data}
        of_all_tasks = [_joined(by_task) for by_task in zip(*found.values(), strict=True)]
        return {
            "dependence": [prompt_dependence(vectors) for vectors in of_all_tasks],
            **{f"{name}_dependence": [prompt_dependence(run) for run in vectors] for name, vectors in found.items()},
        }

    def _added_loss(self) -> list[float]:
        """Increase of each run's loss when each pair gets the vectors of another pair."""
        batch = self.batches.strangers()
        return (self.stack.losses(batch, shift=1) - self.stack.losses(batch)).tolist()

    def _vectors(self, generators: Generators, name: str) -> list[dict[int, Tensor]]:
        """Each run's vectors by layer, [prompts, d_out], from a pass over a task's prompts."""
        self._before_answers(self.data[name].prompts[:PROMPTS])
        vectors = {layer: torch.cat(parts, dim=1).float() for layer, parts in generators.vectors.items()}
        by_layer = {layer: values.chunk(self.runs) for layer, values in vectors.items()}
        return [{layer: parts[run] for layer, parts in by_layer.items()} for run in range(self.runs)]

    def _before_answers(self, prompts: list[list[int]], shift: int = 0) -> Tensor:
        """Last hidden states of each run at the prompts' last tokens, [runs, prompts, hidden]."""
        return self.stack.hidden(self.batches.prompts(prompts, self.tokenizer.eos_token_id), shift)


def _joined(by_task: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {layer: torch.cat([vectors[layer] for vectors in by_task]) for layer in by_task[0]}
