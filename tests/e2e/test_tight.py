"""Still exact when memory, steps and ranks are short."""

from typing import Any

import pytest

from testing.oracle import Oracle
from tests.engines import engine, greedy, prompts, record_steps, scheduler
from vllm_parade import ParadeRequest

pytestmark = pytest.mark.engine


def test_base_prompts_in_chunks_beside_whole_instructions(
    smollm: str, oracle: Oracle, variants: dict[str, ParadeRequest]
) -> None:
    lengths = [300, 128, 90, 128, 200, 40, 5, 128]
    a, b = variants["strong"], variants["rank8"]
    requests = [None, a, b, b, None, a, b, a]
    steps: list[dict[str, int]] = []
    with engine(smollm, enable_parade=True, max_num_batched_tokens=128, max_num_seqs=8) as llm:
        record_steps(llm, steps)
        outputs = llm.generate(prompts(lengths), greedy(), parade_request=requests, use_tqdm=False)
    oracle.check(outputs, requests)
    # The base model's prompt of 300 tokens was cut, PARADE's prompts of 128 were not.
    assert max(step.get("0", 0) for step in steps) < 300
    for number in (1, 3, 7):
        assert next(step[str(number)] for step in steps if str(number) in step) == 128


def test_preempted_requests_resume_exactly(smollm: str, oracle: Oracle, variants: dict[str, ParadeRequest]) -> None:
    a, b = variants["strong"], variants["routing"]
    requests = [a, None, b, a, b, None, a, b]
    preempted: list[str] = []
    with engine(
        smollm,
        enable_parade=True,
        num_gpu_blocks_override=12,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_model_len=256,
    ) as llm:
        record_preemptions(llm, preempted)
        outputs = llm.generate(
            prompts([40, 50, 60, 30, 45, 55, 35, 48]), greedy(40), parade_request=requests, use_tqdm=False
        )
        assert len(scheduler(llm).rows) == 0
    assert len(preempted) > 0
    assert any(requests[int(number)] is not None for number in preempted)
    oracle.check(outputs, requests)


def test_urgent_requests_overtake(smollm: str, oracle: Oracle, variants: dict[str, ParadeRequest]) -> None:
    """Less urgent ones wait, and where blocks run short they are preempted, even those that came first."""
    a, b = variants["strong"], variants["routing"]
    asked, requests, priorities = prompts([40, 50, 45, 55, 35, 48]), [a, None, b, a, b, None], [2, 2, 1, 0, 0, 1]
    steps: list[dict[str, int]] = []
    preempted: list[str] = []
    tight = {"num_gpu_blocks_override": 6, "block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 128}
    # No row to spare: whoever is preempted gives its own to the one that overtakes.
    few = {"max_num_seqs": 2, "parade_vector_cache": 0}
    with engine(smollm, enable_parade=True, scheduling_policy="priority", **few, **tight) as llm:
        record_steps(llm, steps)
        record_preemptions(llm, preempted)
        for part in (slice(2), slice(2, 6)):
            given = {"parade_request": requests[part], "priority": priorities[part], "use_tqdm": False}
            llm.enqueue(asked[part], greedy(40), **given)
            for _ in range(4):
                llm.llm_engine.step()
        outputs = llm.wait_for_completion(use_tqdm=False)
        assert len(scheduler(llm).rows) == 0
    oracle.check(outputs, requests)
    order = list(dict.fromkeys(name for step in steps for name in step))
    assert [priorities[int(name)] for name in order] == [2, 2, 0, 0, 1, 1]
    assert "0" in preempted
    assert all(priorities[int(name)] > 0 for name in preempted)


def test_reset_of_the_prefix_cache_generates_anew(
    smollm: str, oracle: Oracle, variants: dict[str, ParadeRequest]
) -> None:
    requests = [variants["strong"], None, variants["last"]]
    with engine(smollm, enable_parade=True) as llm:
        llm.enqueue(prompts([30, 20, 10]), greedy(12), parade_request=requests, use_tqdm=False)
        for _ in range(4):
            llm.llm_engine.step()
        assert len(scheduler(llm).rows) == 2
        assert llm.reset_prefix_cache(reset_running_requests=True)
        assert len(scheduler(llm).rows) == 0
        outputs = llm.wait_for_completion(use_tqdm=False)
    oracle.check(outputs, requests)


def test_compiled(smollm: str, oracle: Oracle, variants: dict[str, ParadeRequest]) -> None:
    kinds = [None, variants["strong"], variants["rank8"], variants["last"]]
    requests = kinds * 3
    with engine(smollm, enable_parade=True, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode > 0
        outputs = llm.generate(
            prompts([1, 3, 9, 17, 33, 40, 64, 80, 100, 128, 200, 256]),
            greedy(),
            parade_request=requests,
            use_tqdm=False,
        )
    oracle.check(outputs, requests)


def record_preemptions(llm: Any, preempted: list[str]) -> None:
    """Note the numbers of the requests that are preempted."""
    mine = scheduler(llm)
    original = mine._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id.split("-")[0])
        return original(request, *args, **kwargs)

    mine._preempt_request = preempt
