# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding changes the number of steps of an answer, but none of its tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from testing.oracle import Oracle
from tests import rules
from tests.conversations import marked_prompts
from tests.engines import manager, tiny_engine, tiny_greedy, tiny_prompts
from vllm_parade import ParadeRequest
from vllm_parade.config import step_tokens

pytestmark = pytest.mark.engine

METHODS = {
    # Drafts the tokens that followed the last one or two tokens earlier in the text.
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1},
    # The base model drafts for itself. The draft has the same class, but adapters must not adjust it.
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 2},
}


@pytest.fixture(scope="module", params=METHODS)
def llm(request: pytest.FixtureRequest, tiny: str) -> Iterator[Any]:
    config = dict(METHODS[request.param])
    if request.param == "draft_model":
        config["model"] = tiny
    with tiny_engine(tiny, speculative_config=config, max_num_batched_tokens=256) as llm:
        yield llm


def accepted(llm: Any) -> float:
    """Drafted tokens that became part of an answer."""
    (count,) = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"]
    return float(count)


def test_answers_are_the_oracles(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], marked: list[ParadeRequest]
) -> None:
    """Some prompts have one token, or as many as a decode step with drafts."""
    questions = tiny_prompts([1, 3, 4, 20, 60, 2, 30, 100], seed=30)
    # Repeated text, for the n-gram lookup.
    questions += [{"prompt_token_ids": question["prompt_token_ids"] * 3} for question in questions[3:6]]
    choice = [None, tiny_variants["strong"], tiny_variants["routing"]]
    requests = [choice[number % 3] for number in range(len(questions))]
    # Conversations of two turns, in the same batch.
    questions += marked_prompts([40, 90, 300])
    requests += [marked[0], marked[1], marked[0]]
    before = accepted(llm)
    params, rule = tiny_greedy(24), None
    if llm.llm_engine.vllm_config.speculative_config.method == "ngram":
        # With four allowed tokens, pairs repeat soon, so that some n-gram drafts are accepted.
        few = [7, 8, 9, 10]
        params, rule = tiny_greedy(24, allowed_token_ids=few), rules.allow(few)
    outputs = llm.generate(questions, params, parade_request=requests, use_tqdm=False)
    tiny_oracle.check(outputs, requests, rule)
    assert accepted(llm) > before


def test_a_prompt_that_fills_a_step(llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]) -> None:
    """Drafts take tokens of a step. A prompt that fits is answered. A longer one is rejected instead of waiting."""
    most, strong = step_tokens(llm.llm_engine.vllm_config), tiny_variants["strong"]
    outputs = llm.generate(tiny_prompts([most], seed=31), tiny_greedy(), parade_request=strong, use_tqdm=False)
    tiny_oracle.check(outputs, [strong])
    with pytest.raises(VLLMValidationError, match=f"in one step of at most {most} tokens"):
        llm.generate(tiny_prompts([most + 1], seed=31), tiny_greedy(), parade_request=strong, use_tqdm=False)


def test_a_second_request_finds_vectors_and_blocks(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest]
) -> None:
    question = tiny_prompts([130], seed=32)
    for _ in range(2):
        outputs = llm.generate(question, tiny_greedy(), parade_request=tiny_variants["strong"], use_tqdm=False)
        tiny_oracle.check(outputs, [tiny_variants["strong"]])
    assert outputs[0].num_cached_tokens >= 64


def test_the_draft_model_stays_clean(llm: Any) -> None:
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    drafter = getattr(runner.drafter, "model", None)
    adjusted = [module for module in runner.get_model().modules() if hasattr(module, "parade_table")]
    assert len(adjusted) == 3 * len(manager(llm).slots.layers)
    if drafter is not None:
        assert not any(module._forward_hooks for module in drafter.modules())
