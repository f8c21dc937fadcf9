# SPDX-License-Identifier: Apache-2.0
"""Does the prompt matter? PARADE, LoRA and (IA)3 on the same tasks, seeds and budgets, many runs side by side.

A record is one run: its settings, dev loss, the test set's metric, and for PARADE how much its vectors depend on the
prompt and what the metric is when every request gets another prompt's vectors. Longer than 300 lines, since training
and every measurement of a group share its stack of runs.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.batch import Batch, Pair, collate
from benchmarks.senders import SENDERS_TASK
from benchmarks.stacked import Hyperparameters, Stack, Steps, fuse_norms
from vllm_parade.inspect import prompt_dependence
from vllm_parade.train.data import IGNORED_LABEL, encode, encode_prompt, pad_left
from vllm_parade.train.readers import Example
from vllm_parade.train.tasks import TASKS, Task

Record = dict[str, Any]
STUDIED = {**TASKS, SENDERS_TASK.name: SENDERS_TASK}
POOL = 20
WARM_UP = 0.06
EVAL_EVERY = 100
# Of each task; those of all tasks side by side are fewer.
DEV_PAIRS, STRANGERS = 64, 16
TEST_EXAMPLES = {"choices": 400, "text": 64}
# The longest pair in tokens; batches are padded to a multiple, so that there are few sizes of them.
LONGEST, MULTIPLE = 320, 64
# How many prompts a pass answers, once for every run, and how long a text becomes: 99 of 100 responses fit.
PROMPTS, NEW_TOKENS = 64, 48


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
    standardized: bool = False
    """Whether they begin by reading what tells hidden states apart, as `ParadeModel.standardize` lets them."""


class Data:
    """A task's examples as token ids."""

    def __init__(self, tokenizer: Any, task: Task, folder: Path) -> None:
        splits = task.read(folder)
        self.task = task
        self.train = self._pairs(tokenizer, splits.train)
        self.dev = self._pairs(tokenizer, splits.dev)[:DEV_PAIRS]
        self.test: list[Example] = splits.test[: TEST_EXAMPLES["choices" if task.choices else "text"]]
        self.prompts = [encode_prompt(tokenizer, example.prompt) for example in self.test]

    def _pairs(self, tokenizer: Any, examples: list[Example]) -> list[Pair]:
        pairs = encode(tokenizer, examples, max_length=LONGEST)
        return [Pair(torch.tensor(pair["input_ids"]), pair["labels"].count(IGNORED_LABEL)) for pair in pairs]


class Study:
    """A base model and the tasks' data, on which groups of runs are trained and measured.

    Args:
        deadline: time.monotonic() at which training ends, however many steps are left; measuring follows
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        folders: dict[str, Path],
        eval_every: int = EVAL_EVERY,
        deadline: float = float("inf"),
    ) -> None:
        self.base, self.tokenizer, self.eval_every, self.deadline = base, tokenizer, eval_every, deadline
        self.data = {name: Data(tokenizer, STUDIED[name], folder) for name, folder in folders.items()}
        self.device = next(base.parameters()).device
        self.around = template_size(tokenizer)
        fuse_norms(base)

    def records(self, group: Group) -> Iterator[Record]:
        """Train a group and measure each of its runs."""
        clock, stack = Clock(), Stack(self.base, group.method, group.settings, group.runs)
        try:
            if group.standardized:
                stack.standardize(self._sample(group))
            trained = self._train(stack, group, clock)
            measured = [self._measure(stack, group, name) for name in group.tasks]
            if group.method == "parade":
                measured += [self._dependence(stack, group), self._with_strangers_vectors(stack, group)]
            clock.lap("measure_s")
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
                "standardized": group.standardized,
                **vars(run),
                "steps": group.steps,
                "rows": group.rows,
                "parameters": sum(stack.sizes),
                **{key: values[number] for part in (trained, *measured) for key, values in part.items()},
                **clock.seconds,
                "steps_per_s": trained["steps_done"][number] / clock.seconds["train_s"],
                "group_s": clock.total(),
            }

    # Training.

    def _train(self, stack: Stack, group: Group, clock: "Clock") -> dict[str, list[Any]]:
        """Train; every run's parameters are then those of its lowest dev loss.

        Returns:
            of every run its lowest dev loss, mean over the tasks and of each, the step of it and the steps done
        """
        batches = self._batches(group)
        sizes = {batch.ids.shape: batch for batch in batches}
        take_step = Steps(stack, list(sizes.values()))
        dev = {name: self._batch(self.data[name].dev * len(group.runs), group).to(self.device) for name in group.tasks}
        best, lowest = stack.flat.detach().clone(), self._dev_losses(stack, dev)
        best_steps = torch.zeros(len(group.runs), dtype=torch.long, device=self.device)
        clock.lap("prepare_s")
        for step, batch in enumerate(batches, 1):
            take_step(batch, _share(step, group.steps))
            last = step == group.steps or time.monotonic() > self.deadline
            if step % self.eval_every and not last:
                continue
            self._wait()
            clock.lap("train_s")
            losses = self._dev_losses(stack, dev)
            better = losses.mean(dim=0) < lowest.mean(dim=0)
            lowest, best_steps = torch.where(better, losses, lowest), torch.where(better, step, best_steps)
            best = torch.where(better[:, None], stack.flat.detach(), best)
            text = f"{group.name}, {group.method}: step {step} after {clock.total():.1f} s"
            print(f"{text}, lowest dev loss {lowest.mean(dim=0).min().item():.4f}", flush=True)
            clock.lap("dev_s")
            if last:
                break
        with torch.no_grad():
            stack.flat.copy_(best)
        return {
            "dev_loss": lowest.mean(dim=0).tolist(),
            **{f"{name}_dev_loss": losses.tolist() for name, losses in zip(dev, lowest, strict=True)},
            "best_step": best_steps.tolist(),
            "steps_done": [step] * len(group.runs),
        }

    def _batches(self, group: Group) -> list[Batch]:
        """All runs' batches, a step each, every run's pairs in the order of its seed; a step's are about as long."""
        order = random.Random(0)
        streams = [self._stream(group, random.Random(run.seed)) for run in group.runs]
        batches: list[Batch] = []
        while len(batches) < group.steps:
            pools = [sorted((next(stream) for _ in range(POOL * group.rows)), key=_length) for stream in streams]
            # Neighbours in length would else be neighbours in training.
            for place in order.sample(range(POOL), POOL):
                part = slice(place * group.rows, (place + 1) * group.rows)
                batches.append(self._batch([pair for pool in pools for pair in pool[part]], group, MULTIPLE))
        del batches[group.steps :]
        most: dict[torch.Size, int] = {}
        for batch in batches:
            most[batch.ids.shape] = max(most.get(batch.ids.shape, 0), batch.places.shape[1])
        return [batch.widen(most[batch.ids.shape]) for batch in batches]

    def _batch(self, pairs: list[Pair], group: Group, multiple: int = 1) -> Batch:
        batch = collate(pairs, len(group.runs), multiple)
        return batch._replace(instruction=self._words(batch.instruction, group))

    def _sample(self, group: Group) -> Batch:
        """Pairs of all tasks, the same for every run."""
        order = random.Random(0)
        train = [self.data[name].train for name in group.tasks]
        pairs = [pair for every in train for pair in order.sample(every, min(DEV_PAIRS, len(every)))]
        return self._batch(pairs * len(group.runs), group).to(self.device)

    def _stream(self, group: Group, order: random.Random) -> Iterator[Pair]:
        """A run's pairs for ever: of a mixture each task as often as any other."""
        shuffled: dict[str, list[Pair]] = {name: [] for name in group.tasks}
        while True:
            for name in group.tasks:
                if not shuffled[name]:
                    shuffled[name] = order.sample(self.data[name].train, len(self.data[name].train))
                yield shuffled[name].pop()

    @torch.no_grad()
    def _dev_losses(self, stack: Stack, dev: dict[str, Batch]) -> Tensor:
        """Dev loss of every task for every run, [tasks, runs]."""
        return torch.stack([stack.losses(batch) for batch in dev.values()])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Measuring.

    @torch.no_grad()
    def _measure(self, stack: Stack, group: Group, name: str) -> dict[str, list[Any]]:
        """The task's metric for every run; of PARADE also with another prompt's vectors for every prompt."""
        measured: dict[str, list[Any]] = {name: self._scores(stack, group, name)}
        if group.method == "parade":
            measured[f"{name}_swapped"] = self._scores(stack, group, name, shift=1)
        return measured

    def _scores(self, stack: Stack, group: Group, name: str, shift: int = 0) -> list[float]:
        data, answers = self.data[name], [[""] * len(self.data[name].test) for _ in group.runs]
        order = sorted(range(len(data.prompts)), key=lambda place: len(data.prompts[place]))
        find = self._choose if data.task.choices else self._answer
        for start in range(0, len(order), PROMPTS):
            places = order[start : start + PROMPTS]
            texts = find(stack, group, data.task, [data.prompts[place] for place in places], shift)
            for number, text in enumerate(texts):
                run, row = divmod(number, len(places))
                answers[run][places[row]] = text
        return [data.task.metric(texts, data.test) for texts in answers]

    def _choose(self, stack: Stack, group: Group, task: Task, prompts: list[list[int]], shift: int) -> list[str]:
        """The likeliest choice after every prompt, for every run in turn."""
        first = [self.tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in task.choices]
        logits = self.base.lm_head(stack.hidden(self._before_answers(group, prompts), shift))[..., first]
        return [task.choices[place] for place in logits.argmax(dim=-1).flatten().tolist()]

    def _answer(self, stack: Stack, group: Group, task: Task, prompts: list[list[int]], shift: int) -> list[str]:
        """What follows every prompt, for every run in turn."""
        batch = pad_left(prompts * len(group.runs), self.tokenizer.pad_token_id, self.device)
        stack.read(self._words(batch["attention_mask"].bool(), group), shift)
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}
        output = self.base.generate(**batch, max_new_tokens=min(NEW_TOKENS, task.max_new_tokens), **options)
        texts = self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def _dependence(self, stack: Stack, group: Group) -> dict[str, list[dict[str, float]]]:
        """How much every run's vectors differ between prompts: those of each task, and those of all."""
        found = {name: self._vectors(stack, group, name) for name in group.tasks}
        every = [
            {layer: torch.cat([vectors[run][layer] for vectors in found.values()]) for layer in stack.vectors}
            for run in range(len(group.runs))
        ]
        return {
            "dependence": [prompt_dependence(vectors) for vectors in every],
            **{f"{name}_dependence": [prompt_dependence(run) for run in vectors] for name, vectors in found.items()},
        }

    @torch.no_grad()
    def _with_strangers_vectors(self, stack: Stack, group: Group) -> dict[str, list[float]]:
        """What every run's loss gains when each pair gets the vectors of the next one, which is of another task."""
        together = zip(*(self.data[name].dev[:STRANGERS] for name in group.tasks), strict=False)
        pairs = [pair for one_of_each in together for pair in one_of_each]
        batch = self._batch(pairs * len(group.runs), group).to(self.device)
        return {"loss_added_by_strangers_vectors": (stack.losses(batch, shift=1) - stack.losses(batch)).tolist()}

    def _vectors(self, stack: Stack, group: Group, name: str) -> list[dict[int, Tensor]]:
        """Every run's vectors of a pass over a task's prompts, [prompts, d_out], by layer."""
        stack.hidden(self._before_answers(group, self.data[name].prompts[:PROMPTS]))
        runs = range(len(group.runs))
        by_layer = {layer: torch.cat(parts, dim=1).float().chunk(len(runs)) for layer, parts in stack.vectors.items()}
        return [{layer: parts[run] for layer, parts in by_layer.items()} for run in runs]

    def _before_answers(self, group: Group, prompts: list[list[int]]) -> Batch:
        """Prompts, once for every run, whose places are those that predict an answer's first token."""
        pairs = [Pair(torch.tensor([*prompt, self.tokenizer.eos_token_id]), len(prompt)) for prompt in prompts]
        return self._batch(pairs * len(group.runs), group).to(self.device)

    def _words(self, mask: Tensor, group: Group) -> Tensor:
        """The positions of a prompt, [rows, tokens], without the template's where the group leaves them out."""
        if not group.own_words:
            return mask
        place, left = mask.cumsum(dim=1), mask.sum(dim=1, keepdim=True)
        before, after = self.around
        return mask & (place > before) & (place <= left - after)


class Clock:
    """Seconds by what took them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What passed since the last lap belongs to `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        """Of all laps."""
        return sum(self.seconds.values())


def template_size(tokenizer: Any) -> tuple[int, int]:
    """Tokens that the template puts before and after every prompt."""
    one, other = (encode_prompt(tokenizer, text) for text in ("Why is it so?", "nobody knew"))
    shortest = min(len(one), len(other))
    before = next(place for place in range(shortest) if one[place] != other[place])
    after = next(place for place in range(shortest) if one[-1 - place] != other[-1 - place])
    return before, after


def _length(pair: Pair) -> int:
    return len(pair.ids)


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: rising for 6 % of the steps, then falling to nothing."""
    warm_up = max(1, round(WARM_UP * steps))
    return min(step / warm_up, (steps - step + 1) / max(1, steps - warm_up + 1))
