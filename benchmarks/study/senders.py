# SPDX-License-Identifier: Apache-2.0
"""A task in which the sender's name at the start of the prompt determines the correct answer."""

from dataclasses import replace
from pathlib import Path

from vllm_parade.train.readers import Example, Splits, read_sst2
from vllm_parade.train.tasks import TASKS
from vllm_parade.train.templates import SST2_ANSWERS

# For every second sender, the opposite answer is correct.
SENDERS = ("Anna", "Boris", "Clara", "David")


def _from_senders(examples: list[Example]) -> list[Example]:
    return [_from_sender(example, number % len(SENDERS)) for number, example in enumerate(examples)]


def _from_sender(example: Example, sender: int) -> Example:
    (answer,) = example.responses
    turned = SST2_ANSWERS[SST2_ANSWERS.index(answer) - sender % 2]
    return Example(f"{SENDERS[sender]} asks: {example.prompt}", (turned,))


def read_senders(folder: Path) -> Splits:
    """SST-2's examples, assigned to the senders in turn. They are read from the folder `sst2` beside `folder`."""
    splits = read_sst2(folder.with_name("sst2"))
    return Splits(*(_from_senders(examples) for examples in (splits.train, splits.dev, splits.test)))


SENDERS_TASK = replace(TASKS["sst2"], name="senders", read=read_senders)
