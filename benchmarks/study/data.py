# SPDX-License-Identifier: Apache-2.0
"""Turns the tasks' examples into batches for a group of runs."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.batch import Batch, Pair, collate
from benchmarks.study.group import Group
from vllm_parade.train.data import IGNORED_LABEL, encode, encode_prompt
from vllm_parade.train.readers import Example
from vllm_parade.train.tasks import Task

# Pairs per task. `STRANGER_PAIRS` is smaller, because the pairs of all tasks form one batch.
DEV_PAIRS, STRANGER_PAIRS = 64, 16
TEST_EXAMPLES = {"choices": 400, "text": 64}
# Maximum tokens of a pair. Batches are padded to a multiple, so that there are few sizes.
LONGEST, MULTIPLE = 320, 64
# Number of steps whose pairs are sorted by length together.
POOL = 20


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


class Batches:
    """Batches for a group of runs, with rows ordered by run.

    Args:
        data: the data of each task, by name
        template: number of tokens that the template adds before and after each prompt
    """

    def __init__(self, data: dict[str, Data], group: Group, template: tuple[int, int], device: torch.device) -> None:
        self.data = {name: data[name] for name in group.tasks}
        self.group, self.template, self.device = group, template, device

    def training(self) -> list[Batch]:
        """One batch per step, on the CPU. The seed of each run determines the order of its pairs.

        The pairs of a step have similar lengths.
        """
        group, order = self.group, random.Random(0)
        streams = [self._stream(random.Random(run.seed)) for run in group.runs]
        batches: list[Batch] = []
        while len(batches) < group.steps:
            pools = [sorted((next(stream) for _ in range(POOL * group.rows)), key=_length) for stream in streams]
            # Shuffled, so that the lengths of consecutive steps are not sorted.
            for place in order.sample(range(POOL), POOL):
                part = slice(place * group.rows, (place + 1) * group.rows)
                batches.append(self._collate([pair for pool in pools for pair in pool[part]], MULTIPLE))
        del batches[group.steps :]
        most: dict[torch.Size, int] = {}
        for batch in batches:
            most[batch.ids.shape] = max(most.get(batch.ids.shape, 0), batch.places.shape[1])
        return [batch.widen(most[batch.ids.shape]) for batch in batches]

    def dev(self, task: str) -> Batch:
        """The task's dev pairs, the same for every run."""
        return self._for_every_run(self.data[task].dev)

    def sample(self) -> Batch:
        """A sample of training pairs of all tasks, the same for every run."""
        order = random.Random(0)
        train = [data.train for data in self.data.values()]
        return self._for_every_run([pair for some in train for pair in order.sample(some, min(DEV_PAIRS, len(some)))])

    def strangers(self) -> Batch:
        """Dev pairs, the same for every run. With several tasks, consecutive pairs come from different tasks."""
        together = zip(*(data.dev[:STRANGER_PAIRS] for data in self.data.values()), strict=False)
        return self._for_every_run([pair for one_of_each in together for pair in one_of_each])

    def prompts(self, prompts: list[list[int]], eos: int) -> Batch:
        """Prompts, the same for every run. The places are the positions that predict an answer's first token."""
        return self._for_every_run([Pair(torch.tensor([*prompt, eos]), len(prompt)) for prompt in prompts])

    def instruction(self, prompt: Tensor) -> Tensor:
        """The positions of `prompt` that generators read; both are [rows, tokens] bool."""
        if not self.group.own_words:
            return prompt
        place, left = prompt.cumsum(dim=1), prompt.sum(dim=1, keepdim=True)
        before, after = self.template
        return prompt & (place > before) & (place <= left - after)

    def _for_every_run(self, pairs: list[Pair]) -> Batch:
        return self._collate(pairs * len(self.group.runs)).to(self.device)

    def _collate(self, pairs: list[Pair], multiple: int = 1) -> Batch:
        batch = collate(pairs, len(self.group.runs), multiple)
        return batch._replace(instruction=self.instruction(batch.instruction))

    def _stream(self, order: random.Random) -> Iterator[Pair]:
        """Yield a run's pairs endlessly; the tasks of a mixture alternate."""
        shuffled: dict[str, list[Pair]] = {name: [] for name in self.data}
        while True:
            for name, data in self.data.items():
                if not shuffled[name]:
                    shuffled[name] = order.sample(data.train, len(data.train))
                yield shuffled[name].pop()


def template_size(tokenizer: Any) -> tuple[int, int]:
    """Number of tokens that the template adds before and after each prompt."""
    one, other = (encode_prompt(tokenizer, text) for text in ("Why is it so?", "nobody knew"))
    shortest = min(len(one), len(other))
    before = next(place for place in range(shortest) if one[place] != other[place])
    after = next(place for place in range(shortest) if one[-1 - place] != other[-1 - place])
    return before, after


def _length(pair: Pair) -> int:
    return len(pair.ids)
