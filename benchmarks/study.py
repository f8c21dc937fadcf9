# SPDX-License-Identifier: Apache-2.0
"""Does the prompt matter? PARADE, LoRA and (IA)3 on the same tasks, seeds and budgets, many runs side by side.

A record is one run: its settings, dev loss, the test set's metric, and for PARADE how much its vectors depend on the
prompt and what the metric is when every request gets another prompt's vectors.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.stacked import Hyperparameters, Stack
from vllm_parade.inspect import prompt_dependence
from vllm_parade.train.data import IGNORED_LABEL, Collator, encode, encode_prompt, pad_left
from vllm_parade.train.readers import Example
from vllm_parade.train.tasks import TASKS, Task

Record = dict[str, Any]
POOL = 20
WARM_UP = 0.06
DEV_PAIRS = 200
TEST_EXAMPLES = {"choices": 1000, "text": 200}
SHORT, LONG = 64, 320


@dataclass(frozen=True)
class Group:
    """Runs that train side by side: one method with one shape, on one task or on several as a mixture."""

    name: str
    method: str
    tasks: tuple[str, ...]
    runs: tuple[Hyperparameters, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 400
    rows: int = 16
    own_words: bool = False
    """Whether generators read only the user's words, not the template around them."""


class Data:
    """A task's examples as token ids."""

    def __init__(self, tokenizer: Any, task: Task, folder: Path) -> None:
        splits = task.read(folder)
        self.task, self.tokenizer = task, tokenizer
        self.train = [pair for pair in encode(tokenizer, splits.train) if len(pair["input_ids"]) <= LONG]
        self.dev = [pair for pair in encode(tokenizer, splits.dev) if len(pair["input_ids"]) <= LONG][:DEV_PAIRS]
        self.test: list[Example] = splits.test[: TEST_EXAMPLES["choices" if task.choices else "text"]]
        self.prompts = [encode_prompt(tokenizer, example.prompt) for example in self.test]


class Study:
    """A base model and the tasks' data, on which groups of runs are trained and measured."""

    def __init__(self, base: Any, tokenizer: Any, folders: dict[str, Path], eval_every: int = 50) -> None:
        self.base, self.tokenizer, self.eval_every = base, tokenizer, eval_every
        self.data = {name: Data(tokenizer, TASKS[name], folder) for name, folder in folders.items()}
        self.collate, self.device = Collator(tokenizer.pad_token_id), next(base.parameters()).device
        self.around = template_size(tokenizer)

    def records(self, group: Group) -> Iterator[Record]:
        """Train a group and measure each of its runs."""
        started = time.monotonic()
        stack = Stack(self.base, group.method, group.settings, group.runs)
        try:
            dev_losses, best_steps = self._train(stack, group)
            measured = [self._measure(stack, group, name) for name in group.tasks]
        finally:
            stack.remove()
        for number, run in enumerate(group.runs):
            yield {
                "workload": "study",
                "group": group.name,
                "variant": group.method,
                "tasks": list(group.tasks),
                "settings": group.settings,
                "own_words": group.own_words,
                **vars(run),
                "steps": group.steps,
                "rows": group.rows,
                "parameters": sum(parameter[number].numel() for parameter in stack.parameters.values()),
                "dev_loss": dev_losses[number],
                "best_step": best_steps[number],
                **{key: values[number] for task in measured for key, values in task.items()},
                "group_s": time.monotonic() - started,
            }

    # Training.

    def _train(self, stack: Stack, group: Group) -> tuple[list[float], list[int]]:
        """Train; every run's parameters are then those of its lowest dev loss."""
        runs, batches = len(group.runs), self._batches(group)
        best_losses, best_steps = [float("inf")] * runs, [0] * runs
        best = {name: parameter.detach().clone() for name, parameter in stack.parameters.items()}
        for step in range(1, group.steps + 1):
            batch = next(batches)
            stack.step(stack.losses(batch, self._instruction(batch, group)), _share(step, group.steps))
            if step % self.eval_every and step < group.steps:
                continue
            for run, loss in enumerate(self._dev_losses(stack, group)):
                if loss < best_losses[run]:
                    best_losses[run], best_steps[run] = loss, step
                    for name, parameter in stack.parameters.items():
                        best[name][run] = parameter[run].detach()
        with torch.no_grad():
            for name, parameter in stack.parameters.items():
                parameter.copy_(best[name])
        return best_losses, best_steps

    def _batches(self, group: Group) -> Iterator[dict[str, Tensor]]:
        """Batches of all runs, each run's pairs in the order of its seed; those of one step are about as long."""
        order = random.Random(0)
        streams = [self._stream(group, random.Random(run.seed)) for run in group.runs]
        while True:
            pools = [sorted((next(stream) for _ in range(POOL * group.rows)), key=_length) for stream in streams]
            for place in order.sample(range(POOL), POOL):
                part = slice(place * group.rows, (place + 1) * group.rows)
                # Neighbours in length would else be neighbours in the batch.
                yield self._to_device(self.collate([pair for pool in pools for pair in pool[part]]))

    def _stream(self, group: Group, order: random.Random) -> Iterator[dict[str, list[int]]]:
        """A run's pairs for ever: of a mixture each task as often as any other."""
        shuffled: dict[str, list[dict[str, list[int]]]] = {name: [] for name in group.tasks}
        while True:
            for name in group.tasks:
                if not shuffled[name]:
                    shuffled[name] = order.sample(self.data[name].train, len(self.data[name].train))
                yield shuffled[name].pop()

    @torch.no_grad()
    def _dev_losses(self, stack: Stack, group: Group, shift: int = 0) -> list[float]:
        """Mean over the tasks of the dev loss, for every run."""
        means = []
        for name in group.tasks:
            pairs, losses, count = sorted(self.data[name].dev, key=_length), torch.zeros(len(group.runs)), 0
            for start in range(0, len(pairs), group.rows):
                part = pairs[start : start + group.rows]
                batch = self._to_device(self.collate(part * len(group.runs)))
                tokens = sum(label != IGNORED_LABEL for pair in part for label in pair["labels"])
                losses += tokens * stack.losses(batch, self._instruction(batch, group), shift).float().cpu()
                count += tokens
            means.append(losses / count)
        return torch.stack(means).mean(dim=0).tolist()

    # Measuring.

    def _measure(self, stack: Stack, group: Group, name: str) -> dict[str, list[Any]]:
        """The task's metric for every run; of PARADE also dependence on the prompt, and the metric without it."""
        measured: dict[str, list[Any]] = {name: self._scores(stack, group, name)}
        if group.method != "parade":
            return measured
        measured[f"{name}_swapped"] = self._scores(stack, group, name, shift=1)
        vectors: list[dict[int, list[Tensor]]] = [{} for _ in group.runs]
        prompts = self.data[name].prompts[: 4 * group.rows]
        for _, batch, mask in self._prompt_batches(prompts, group):
            stack.read(mask)
            with torch.no_grad():
                self.base.model(**batch)
            for layer, found in stack.vectors.items():
                for run, part in enumerate(found.float().cpu().unflatten(0, (len(group.runs), -1))):
                    vectors[run].setdefault(layer, []).append(part)
        every = [prompt_dependence({layer: torch.cat(parts) for layer, parts in found.items()}) for found in vectors]
        measured[f"{name}_dependence"] = every
        return measured

    @torch.no_grad()
    def _scores(self, stack: Stack, group: Group, name: str, shift: int = 0) -> list[float]:
        data, answers = self.data[name], [[""] * len(self.data[name].test) for _ in group.runs]
        for indices, batch, mask in self._prompt_batches(data.prompts, group):
            stack.read(mask, shift)
            texts = self._choose(batch, data.task) if data.task.choices else self._answer(batch, data.task)
            for place, text in enumerate(texts):
                run, row = divmod(place, len(indices))
                answers[run][indices[row]] = text
        return [data.task.metric(texts, data.test) for texts in answers]

    def _choose(self, batch: dict[str, Tensor], task: Task) -> list[str]:
        first = [self.tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in task.choices]
        hidden = self.base.model(**batch)[0][:, -1]
        return [task.choices[place] for place in self.base.lm_head(hidden)[:, first].argmax(dim=1).tolist()]

    def _answer(self, batch: dict[str, Tensor], task: Task) -> list[str]:
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}
        output = self.base.generate(**batch, max_new_tokens=task.max_new_tokens, **options)
        texts = self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompt_batches(
        self, prompts: Sequence[list[int]], group: Group
    ) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
        """Places of some prompts, these prompts once for every run, and what generators read of them."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(order), SHORT):
            places = order[start : start + SHORT]
            rows = [prompts[place] for place in places] * len(group.runs)
            batch = pad_left(rows, self.tokenizer.pad_token_id, self.device)
            yield places, batch, self._words(batch["attention_mask"].bool(), group)

    def _instruction(self, batch: dict[str, Tensor], group: Group) -> Tensor:
        before = ((batch["labels"] != IGNORED_LABEL).cumsum(dim=1) == 0) & batch["attention_mask"].bool()
        return self._words(before, group)

    def _words(self, mask: Tensor, group: Group) -> Tensor:
        """The positions of a prompt, [rows, tokens], without the template's where the group leaves them out."""
        if not group.own_words:
            return mask
        place, left = mask.cumsum(dim=1), mask.sum(dim=1, keepdim=True)
        before, after = self.around
        return mask & (place > before) & (place <= left - after)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def template_size(tokenizer: Any) -> tuple[int, int]:
    """Tokens that the template puts before and after every prompt."""
    one, other = (encode_prompt(tokenizer, text) for text in ("Why is it so?", "nobody knew"))
    shortest = min(len(one), len(other))
    before = next(place for place in range(shortest) if one[place] != other[place])
    after = next(place for place in range(shortest) if one[-1 - place] != other[-1 - place])
    return before, after


def _length(pair: dict[str, list[int]]) -> int:
    return len(pair["input_ids"])


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: rising for 6 % of the steps, then falling to nothing."""
    warm_up = max(1, round(WARM_UP * steps))
    return min(step / warm_up, (steps - step + 1) / max(1, steps - warm_up + 1))
