# SPDX-License-Identifier: Apache-2.0
"""Random scenarios on a real engine: every answer equals that of the same request alone.

The engine has few blocks, rows, slots and tokens a step. Requests share prefixes, repeat, ask for several answers, use
different adapters and are aborted. The expected answers come from an engine that caches nothing.
"""

from itertools import count, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from vllm import SamplingParams

from testing.random_models import INNER, make_adapter
from tests.engines import engine, prompts, scheduler
from tests.strategies import weighted
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape

pytestmark = pytest.mark.engine

LENGTHS = (1, 20, 33, 64, 65, 90)
# The whole prompt, or a prefix that many prompts share.
INSTRUCTIONS = (None, 20)
ANSWER = 6
PLAIN = {"enable_parade": True, "skip_tokenizer_init": True, "max_cpu_parades": 8}
SHORT = {
    "max_num_seqs": 3,
    "max_num_batched_tokens": 96,
    "max_model_len": 96 + ANSWER,
    "block_size": 32,
    "num_gpu_blocks_override": 8,
    "max_parades": 2,
    "parade_vector_cache": 1,
}
# vLLM allows n > 1 only with sampling, and no temperature below COLDEST. At that temperature, sampling always draws a
# token that leads by more than CLEAR in log-probability.
COLDEST, CLEAR = 0.01, 0.15
ADD = st.tuples(st.just("add"), st.integers(0, 999), st.sampled_from([1, 1, 1, 3]))
STEP = st.tuples(st.just("step"), st.integers(1, 4))
ABORT = st.tuples(st.just("abort"), st.integers(0, 99))
RESET = st.just(("reset",))
SCENARIO = st.lists(weighted({ADD: 20, STEP: 16, ABORT: 4, RESET: 1}), min_size=5, max_size=30)


@pytest.fixture(scope="module")
def pool(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], ParadeRequest | None]]:
    """Prompts with a common prefix, under the base model and under adapters."""
    folder, shape = (
        tmp_path_factory.mktemp("scenarios"),
        BaseModelShape.from_hf_config(AutoConfig.from_pretrained(tiny)),
    )
    made = [make_adapter(folder / f"a{seed}", shape, seed, inner=INNER) for seed in range(3)]
    (whole,) = prompts([max(LENGTHS)], seed=40, vocab=AutoConfig.from_pretrained(tiny).vocab_size)
    cut = [{"prompt_token_ids": whole["prompt_token_ids"][:length]} for length in LENGTHS]
    requests: list[ParadeRequest | None] = [None]
    for adapter, tokens in product(made, INSTRUCTIONS):
        requests.append(ParadeRequest(adapter.name, adapter.path, instruction_tokens=tokens))
    return [
        (prompt, request)
        for prompt, request in product(cut, requests)
        if request is None or (request.instruction_tokens or 0) <= len(prompt["prompt_token_ids"])
    ]


@pytest.fixture(scope="module")
def alone(tiny: str, pool: list[tuple[dict[str, Any], ParadeRequest | None]]) -> list[tuple[tuple[int, ...], bool]]:
    """Each pool request's answer alone, and whether every token of it leads by more than CLEAR."""
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False, logprobs=2)
    options = {"enable_prefix_caching": False, "parade_vector_cache": 0, "max_num_seqs": 1}
    with engine(tiny, **PLAIN, max_parades=8, **options) as llm:
        answers = [
            llm.generate([prompt], params, parade_request=request, use_tqdm=False)[0] for prompt, request in pool
        ]
    tokens = [tuple(answer.outputs[0].token_ids) for answer in answers]
    # With equal answers, the test would not notice one request's answer in place of another's.
    assert len(set(tokens)) > len(tokens) // 2
    best = [[sorted(value.logprob for value in step.values())[-2:] for step in a.outputs[0].logprobs] for a in answers]
    clear = [all(first - second > CLEAR for second, first in steps) for steps in best]
    assert sum(clear) >= 5
    return list(zip(tokens, clear, strict=True))


@pytest.mark.parametrize(("examples", "least"), [(100, 1), pytest.param(1000, 100, marks=pytest.mark.nightly)])
def test_every_answer_is_that_of_the_request_alone(tiny: str, pool: Any, alone: Any, examples: int, least: int) -> None:
    """`least`: hits, misses and evictions must each exceed this number."""
    names = count()
    with engine(tiny, **PLAIN, **SHORT) as llm:
        core = llm.llm_engine

        @settings(max_examples=examples, derandomize=True)
        @given(SCENARIO)
        def run(events: list[tuple[Any, ...]]) -> None:
            # A failed scenario leaves requests and cached data behind.
            while core.has_unfinished_requests():
                core.step()
            core.reset_prefix_cache()
            waiting: dict[str, int] = {}

            def step() -> None:
                for output in core.step():
                    if output.finished:
                        number = waiting.pop(output.request_id)
                        for answer in output.outputs:
                            assert tuple(answer.token_ids) == alone[number][0], f"request {number} of the pool"

            for event, *arguments in events:
                if event == "add":
                    number = arguments[0] % len(pool)
                    prompt, request = pool[number]
                    answers = arguments[1] if alone[number][1] else 1
                    params = SamplingParams(
                        n=answers,
                        temperature=COLDEST if answers > 1 else 0,
                        max_tokens=ANSWER,
                        ignore_eos=True,
                        detokenize=False,
                    )
                    name = f"s{next(names)}"
                    waiting[name] = number
                    core.add_request(name, prompt, params, lora_request=request)
                elif event == "step":
                    for _ in range(arguments[0]):
                        step()
                elif event == "abort" and waiting:
                    name = list(waiting)[arguments[0] % len(waiting)]
                    del waiting[name]
                    core.abort_request([name])
                elif event == "reset":
                    core.reset_prefix_cache()
            for _ in range(1000):
                if not core.has_unfinished_requests():
                    break
                step()
            assert not waiting
            assert len(scheduler(llm).rows) == 0

        run()
        rows = scheduler(llm).rows
        assert min(rows.hits, rows.misses, rows.evictions) > least
