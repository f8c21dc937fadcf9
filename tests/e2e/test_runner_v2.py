"""Model runner V2, the default on GPUs: exact like V1. Runs on a GPU, or on the CPU under Triton's interpreter."""

from itertools import cycle
from typing import Any

import pytest

from testing.oracle import Oracle
from tests.conversations import conversation, marked_prompts
from tests.engines import engine, greedy, prompts, scheduler
from vllm_parade import ParadeRequest
from vllm_parade.adapter import SITES

pytestmark = [pytest.mark.engine, pytest.mark.triton]

OPTIONS = {"enable_parade": True, "parade_sites": SITES, "skip_tokenizer_init": True}


@pytest.fixture
def adapters(tiny_variants: dict[str, ParadeRequest], marked: list[ParadeRequest]) -> list[ParadeRequest]:
    return [*tiny_variants.values(), marked[0]]


def runner(llm: Any) -> str:
    """The model runner's class and base classes, with their modules."""
    core = llm.llm_engine.engine_core.engine_core
    return repr(type(core.model_executor.driver_worker.worker.model_runner).__mro__)


@pytest.mark.parametrize("ops", ["kernels", "reference"])
def test_every_kind_of_adapter_in_one_batch(
    tiny: str, adapters: list[ParadeRequest], ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARADE_OPS", ops)
    kinds = cycle([*adapters, None])
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 16, 17, 31, 32, 33, 1, 62]
    requests = [next(kinds) for _ in lengths]
    with engine(tiny, **OPTIONS) as llm:
        assert "vllm.v1.worker.gpu.model_runner" in runner(llm)
        outputs = llm.generate(
            marked_prompts(lengths), greedy(6, detokenize=False), parade_request=requests, use_tqdm=False
        )
    Oracle(tiny).check(outputs, requests)


def test_equal_requests_share_rows_and_blocks(tiny: str, adapters: list[ParadeRequest]) -> None:
    """They share within one step and later, beside requests with the same prompt under another adapter."""
    a, b = adapters[0], adapters[3]
    requests = [a, b, a, None, a, b]
    with engine(tiny, **OPTIONS, block_size=32) as llm:
        for round_number in range(2):
            outputs = llm.generate(
                prompts([70], vocab=512) * 6, greedy(6, detokenize=False), parade_request=requests, use_tqdm=False
            )
            Oracle(tiny).check(outputs, requests)
            if round_number == 1:
                assert [output.num_cached_tokens for output in outputs] == [64] * 6
        rows = scheduler(llm).rows
        assert (rows.hits, rows.misses) == (8, 2)


def test_preempted_requests_come_again_as_new_ones(tiny: str, adapters: list[ParadeRequest]) -> None:
    requests = [adapters[0], adapters[-1], adapters[3], adapters[0], adapters[-1], None]
    tight = {"num_gpu_blocks_override": 8, "block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(tiny, **OPTIONS, **tight, max_model_len=160) as llm:
        outputs = llm.generate(
            marked_prompts([40, 50, 60, 30, 45, 55]),
            greedy(30, detokenize=False),
            parade_request=requests,
            use_tqdm=False,
        )
        preemptions = [m for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(metric.value for metric in preemptions) > 0
    Oracle(tiny).check(outputs, requests)


def test_a_conversation_goes_on(tiny: str, marked: list[ParadeRequest]) -> None:
    """The last prompts have one or two new tokens, which V2 computes like decode tokens."""
    tokens = conversation(20, 40, 28, 20)
    whole = [tokens[:92], tokens, [*tokens, 500], [*tokens, 500, 501]]
    with engine(tiny, **OPTIONS, block_size=32, max_num_batched_tokens=64) as llm:
        for prompt in whole:
            requests = [marked[0], None, marked[1]]
            outputs = llm.generate(
                [{"prompt_token_ids": prompt}] * 3, greedy(4, detokenize=False), parade_request=requests, use_tqdm=False
            )
            Oracle(tiny).check(outputs, requests)
        assert outputs[0].num_cached_tokens == len(tokens) // 32 * 32
