"""Answers stay exact with few blocks, rows and slots, and with small steps."""

from pathlib import Path
from typing import Any

import pytest

from testing.oracle import Oracle
from testing.random_models import INNER, make_adapter
from tests.engines import answered_twice, manager, record_steps, scheduler, tiny_engine, tiny_greedy, tiny_prompts
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape

pytestmark = pytest.mark.engine


def test_base_prompts_in_chunks_beside_whole_instructions(
    tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]
) -> None:
    lengths = [300, 128, 90, 128, 200, 40, 5, 128]
    a, b = tiny_variants["strong"], tiny_variants["rank8"]
    requests = [None, a, b, b, None, a, b, a]
    steps: list[dict[str, int]] = []
    with tiny_engine(tiny, max_num_batched_tokens=128, max_num_seqs=8) as llm:
        record_steps(llm, steps)
        outputs = llm.generate(tiny_prompts(lengths), tiny_greedy(), parade_request=requests, use_tqdm=False)
    tiny_oracle.check(outputs, requests)
    # The base model's prompt of 300 tokens was split, PARADE's prompts of 128 were not.
    assert max(step.get("0", 0) for step in steps) < 300
    for number in (1, 3, 7):
        assert next(step[str(number)] for step in steps if str(number) in step) == 128


def test_preempted_requests_resume_exactly(
    tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]
) -> None:
    a, b = tiny_variants["strong"], tiny_variants["routing"]
    requests = [a, None, b, a, b, None, a, b]
    preempted: list[str] = []
    with tiny_engine(
        tiny,
        num_gpu_blocks_override=12,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_model_len=256,
    ) as llm:
        record_preemptions(llm, preempted)
        outputs = llm.generate(
            tiny_prompts([40, 50, 60, 30, 45, 55, 35, 48]), tiny_greedy(40), parade_request=requests, use_tqdm=False
        )
        assert len(scheduler(llm).rows) == 0
    assert len(preempted) > 0
    assert any(requests[int(number)] is not None for number in preempted)
    tiny_oracle.check(outputs, requests)


def test_urgent_requests_overtake(tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]) -> None:
    """Less urgent requests wait. If blocks run short they are preempted, even if they arrived first."""
    a, b = tiny_variants["strong"], tiny_variants["routing"]
    asked, requests, priorities = tiny_prompts([40, 50, 45, 55, 35, 48]), [a, None, b, a, b, None], [2, 2, 1, 0, 0, 1]
    steps: list[dict[str, int]] = []
    preempted: list[str] = []
    tight = {"num_gpu_blocks_override": 6, "block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 128}
    # No spare row: a preempted request's row goes to the request that overtakes it.
    few = {"max_num_seqs": 2, "parade_vector_cache": 0}
    with tiny_engine(tiny, scheduling_policy="priority", **few, **tight) as llm:
        record_steps(llm, steps)
        record_preemptions(llm, preempted)
        for part in (slice(2), slice(2, 6)):
            given = {"parade_request": requests[part], "priority": priorities[part], "use_tqdm": False}
            llm.enqueue(asked[part], tiny_greedy(40), **given)
            for _ in range(4):
                llm.llm_engine.step()
        outputs = llm.wait_for_completion(use_tqdm=False)
        assert len(scheduler(llm).rows) == 0
    tiny_oracle.check(outputs, requests)
    order = list(dict.fromkeys(name for step in steps for name in step))
    assert [priorities[int(name)] for name in order] == [2, 2, 0, 0, 1, 1]
    assert "0" in preempted
    assert all(priorities[int(name)] > 0 for name in preempted)


def test_reset_of_the_prefix_cache_generates_anew(
    tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]
) -> None:
    requests = [tiny_variants["strong"], None, tiny_variants["last"]]
    with tiny_engine(tiny) as llm:
        llm.enqueue(tiny_prompts([30, 20, 10]), tiny_greedy(12), parade_request=requests, use_tqdm=False)
        for _ in range(4):
            llm.llm_engine.step()
        assert len(scheduler(llm).rows) == 2
        assert llm.reset_prefix_cache(reset_running_requests=True)
        assert len(scheduler(llm).rows) == 0
        outputs = llm.wait_for_completion(use_tqdm=False)
    tiny_oracle.check(outputs, requests)


def test_sixty_four_adapters_through_few_slots(
    tiny: str, tiny_oracle: Oracle, tiny_shape: BaseModelShape, tmp_path: Path
) -> None:
    kind = {"layers_to_transform": (0, 2), "inner": INNER}
    requests = [make_adapter(tmp_path / f"t{number}", tiny_shape, 100 + number, **kind) for number in range(64)]
    # Some adapters again in another order: others have taken their slots.
    again = requests[::-7]
    with tiny_engine(tiny, max_parades=4, max_cpu_parades=96) as llm:
        for lengths, asked in (([20] * 64, requests), ([9] * len(again), again)):
            given = {"parade_request": asked, "use_tqdm": False}
            tiny_oracle.check(llm.generate(tiny_prompts(lengths), tiny_greedy(4), **given), asked)
        assert len(manager(llm).slots.contents) == 4
        assert len(manager(llm).slots.host) >= 64


def test_compiled(tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]) -> None:
    kinds = [None, tiny_variants["strong"], tiny_variants["rank8"], tiny_variants["last"]]
    requests = kinds * 3
    with tiny_engine(tiny, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode > 0
        outputs = llm.generate(
            tiny_prompts([1, 3, 9, 17, 33, 40, 64, 80, 100, 128, 200, 256]),
            tiny_greedy(),
            parade_request=requests,
            use_tqdm=False,
        )
    tiny_oracle.check(outputs, requests)


def test_candidates_of_prompts_in_chunks(
    tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]
) -> None:
    """Prompt candidates are computed without the prefix cache: in one step if vectors are missing, else in chunks."""
    strong, step_tokens, block = tiny_variants["strong"], 256, 32
    part = ParadeRequest("part", strong.path, instruction_tokens=20)
    asked = tiny_prompts([150, 120, 150, 90], seed=60), [part, strong, None, tiny_variants["rank8"]]
    params = tiny_greedy(4, logprobs=2, prompt_logprobs=2)
    steps: list[dict[str, int]] = []
    with tiny_engine(tiny, block_size=block, max_num_seqs=8, max_num_batched_tokens=step_tokens) as llm:
        outputs, requests = answered_twice(llm, asked, params, block_size=block, cached=False)
        # Again after the same requests without prompt candidates.
        answered_twice(llm, asked, tiny_greedy(4), block_size=block)
        record_steps(llm, steps)
        outputs += llm.generate(asked[0], params, parade_request=asked[1], use_tqdm=False)
    tiny_oracle.check_candidates(outputs, requests + asked[1], 2)
    assert [output.num_cached_tokens for output in outputs[-4:]] == [0] * 4
    # Each step has at most 256 tokens, so the second prompt was split over two steps.
    second = [step[name] for step in steps for name in step if name.split("-")[0] == outputs[-3].request_id]
    assert second == [step_tokens - 150, 120 + 150 - step_tokens, 1, 1, 1]


def record_preemptions(llm: Any, preempted: list[str]) -> None:
    """Record the numbers of preempted requests."""
    mine = scheduler(llm)
    original = mine._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id.split("-")[0])
        return original(request, *args, **kwargs)

    mine._preempt_request = preempt
