# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_parade.adapter import AdapterConfig
from vllm_parade.layers import BatchMetadata
from vllm_parade.ops.job import GeneratorJob
from vllm_parade.ops.packed import GeneratorLayout

LAYOUT = GeneratorLayout.of(AdapterConfig(), 32, 48)


@pytest.fixture
def batch():
    return BatchMetadata.make(8, 4, 16, torch.device("cpu"), kernels=False)


def test_begins_with_the_identity(batch):
    assert batch.token_rows.dtype == torch.int32
    assert batch.token_rows.tolist() == [0] * 8
    assert batch.jobs == []


def test_every_token_gets_its_requests_row(batch):
    batch.prepare([3, 0, 5], [2, 3, 1], [])
    assert batch.token_rows.tolist() == [3, 3, 0, 0, 0, 5, 0, 0]


def test_padding_is_the_identity_whatever_stood_there(batch):
    batch.prepare([7], [8], [])
    batch.prepare([2], [3], [])
    assert batch.token_rows.tolist() == [2, 2, 2, 0, 0, 0, 0, 0]


def test_address_stays(batch):
    """CUDA graphs replay with the captured address."""
    address = batch.token_rows.data_ptr()
    batch.prepare([1, 2], [4, 4], [])
    batch.clear()
    assert batch.token_rows.data_ptr() == address


def test_jobs_are_those_of_this_step(batch):
    job = GeneratorJob(row=1, start=0, length=4, slot=0, layout=LAYOUT)
    batch.prepare([1], [4], [job])
    assert batch.jobs == [job]
    assert batch.step.counts.tolist() == [1, 1, 0, 0]
    offsets = [LAYOUT.offsets[name] for name in ("pooler.query", "pooler.weight", "up.weight", "up.bias")]
    assert batch.step.jobs[0].tolist() == [1, 0, 4, 0, 12, 4, 0, 0, 0, LAYOUT.size, *offsets, 0, 0]
    assert batch.step.tiles[0].tolist() == [0, 0]
    batch.prepare([1], [1], [])
    assert batch.jobs == []
    assert batch.step.counts.tolist() == [0, 0, 0, 0]


def test_long_instructions_are_cut_into_tiles():
    batch = BatchMetadata.make(100, 4, 16, torch.device("cpu"), kernels=False)
    jobs = [GeneratorJob(row=n, start=0, length=length, slot=0, layout=LAYOUT) for n, length in ((1, 33), (2, 64))]
    batch.prepare([1, 2], [33, 64], jobs)
    assert batch.step.counts.tolist() == [2, 4, 0, 0]
    assert batch.step.tiles[:4].tolist() == [[0, 0], [0, 32], [1, 0], [1, 32]]


def test_the_base_model_alone_costs_one_copy_at_most(batch):
    """There is no copy if nothing has to be reset."""
    batch.prepare([2, 0], [4, 1], [GeneratorJob(row=2, start=0, length=4, slot=0, layout=LAYOUT)])
    batch.prepare([0], [1], [])
    assert batch.token_rows.tolist() == [0] * 8
    assert batch.step.counts.tolist() == [0, 0, 0, 0]
    written = batch.buffer._version
    batch.prepare([0, 0], [5, 3], [])
    assert batch.buffer._version == written
    batch.prepare([0, 3], [1, 1], [])
    assert batch.token_rows.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]


def test_clear_is_a_step_without_requests(batch):
    batch.prepare([1], [4], [GeneratorJob(row=1, start=0, length=4, slot=0, layout=LAYOUT)])
    batch.clear()
    assert batch.token_rows.tolist() == [0] * 8
    assert batch.jobs == []
