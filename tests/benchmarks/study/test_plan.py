# SPDX-License-Identifier: Apache-2.0
"""What the study runs."""

from benchmarks.study.command import PARTS
from benchmarks.study.plan import GROUPS
from vllm_parade.train.methods import peft_config


def test_every_part_has_groups_that_can_be_run() -> None:
    assert tuple(GROUPS) == PARTS
    for part in GROUPS.values():
        groups = list(part())
        assert groups
        for group in groups:
            assert {run.seed for run in group.runs} == {0, 1, 2}
            peft_config(group.method, group.settings)
