# SPDX-License-Identifier: Apache-2.0
"""Trains and measures PARADE, LoRA and (IA)3 on the same tasks, seeds and budgets, with many runs side by side.

A record describes one run: its settings, dev loss and test metric. For PARADE, it also says how much the vectors depend
on the prompt, and what the metric is when each request gets another prompt's vectors.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import Record
from benchmarks.study.data import Batches, Data, template_size
from benchmarks.study.group import Group
from benchmarks.study.measuring import Measurement
from benchmarks.study.senders import SENDERS_TASK
from benchmarks.study.stack import Stack, fuse_norms
from benchmarks.study.training import EVAL_EVERY, Clock, train
from vllm_parade.train.tasks import TASKS

STUDIED = {**TASKS, SENDERS_TASK.name: SENDERS_TASK}


class Study:
    """A base model and the tasks' data, for training and measuring groups of runs.

    Args:
        folders: folder of each task's data, by task
        deadline: time.monotonic() at which training stops, even if steps are left; measuring follows
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
        self.template = template_size(tokenizer)
        fuse_norms(base)

    def records(self, group: Group) -> Iterator[Record]:
        """Train a group, measure it, and yield one record per run."""
        clock, stack = Clock(), Stack(self.base, group.method, group.settings, group.runs)
        batches = Batches(self.data, group, self.template, stack.device)
        try:
            if group.standardized:
                stack.standardize(batches.sample())
            trained = train(stack, batches, clock, self.eval_every, self.deadline)
            measured = Measurement(stack, batches, self.tokenizer).results()
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
                **{key: values[number] for key, values in (trained | measured).items()},
                **clock.seconds,
                "steps_per_s": trained["steps_done"][number] / clock.seconds["train_s"],
                "group_s": clock.total(),
            }
