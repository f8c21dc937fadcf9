# SPDX-License-Identifier: Apache-2.0
"""The task of the senders."""

from pathlib import Path

from benchmarks.study.senders import SENDERS, read_senders
from tests.tasks import write_sst2
from vllm_parade.train.readers import read_sst2
from vllm_parade.train.templates import SST2_ANSWERS


def test_every_other_sender_wants_the_opposite(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    plain, sent = read_sst2(write_sst2(tmp_path / "sst2")), read_senders(tmp_path / "senders")
    assert len(sent.train) == len(plain.train) > len(SENDERS)
    for number, (mine, other) in enumerate(zip(sent.test, plain.test, strict=True)):
        assert mine.prompt == f"{SENDERS[number % len(SENDERS)]} asks: {other.prompt}"
        assert (mine.responses == other.responses) == (number % 2 == 0)
    assert {example.responses[0] for example in sent.test} <= set(SST2_ANSWERS)
