# SPDX-License-Identifier: Apache-2.0
"""Conversations under adapters that mark turns are exact, and are reused turn by turn."""

from collections.abc import Iterator
from typing import Any

import pytest
from peft import PeftModel
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from testing.oracle import TOLERANCE, Oracle, beams
from tests.conversations import asked, conversation
from tests.e2e.test_tight import record_preemptions
from tests.engines import engine, record_steps, scheduler, tiny_engine, tiny_greedy
from vllm_parade import ParadeRequest

pytestmark = pytest.mark.engine

BLOCK, STEP = 32, 128
# System prompts or documents, then one to six turns; the longest prompts need several steps.
CONVERSATIONS = [
    conversation(0, 5),
    conversation(40, 20, 10, 7),
    conversation(3, 1, 30, 2, 40, 3, 1, 4, 5, 6, 7, 8),
    conversation(200, 90, 30, 100),
    conversation(64, 28, 32, 60, 1, 31, seed=1),
    conversation(33, 40, 50, 60, 70, 80, 90, 100, seed=2),
]
ANSWER = 10


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[Any]:
    with engine(tiny, enable_parade=True, block_size=BLOCK, max_num_batched_tokens=STEP, max_num_seqs=16) as llm:
        yield llm


def generate(llm: Any, prompts: list[Any], requests: Any, tokens: int = ANSWER, **options: Any) -> list[Any]:
    params = tiny_greedy(tokens, **options)
    return llm.generate(prompts, params, parade_request=requests, use_tqdm=False)


def following(output: Any, words: list[int]) -> list[int]:
    """The conversation's next prompt: its last one, the answer and the user's next message."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids, *words]


def test_conversations_beside_whole_prompts_and_the_base_model(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], marked: list[ParadeRequest]
) -> None:
    """Three rounds: cold and in chunks, then cached, then with one more turn."""
    whole = asked(conversation(0, 70), conversation(20, 30))
    prompts = asked(*CONVERSATIONS, *CONVERSATIONS, CONVERSATIONS[3]) + whole
    requests = [marked[(number + number // 6) % 3] for number in range(12)] + [
        None,
        tiny_variants["strong"],
        tiny_variants["last"],
    ]
    cold = generate(llm, prompts, requests)
    tiny_oracle.check(cold, requests)
    assert max(len(prompt["prompt_token_ids"]) for prompt in prompts) > 3 * STEP
    rows = scheduler(llm).rows
    before = rows.misses
    again = generate(llm, prompts, requests)
    tiny_oracle.check(again, requests)
    assert rows.misses == before
    block_starts = [(len(prompt["prompt_token_ids"]) - 1) // BLOCK * BLOCK for prompt in prompts]
    assert [output.num_cached_tokens for output in again] == block_starts
    later = asked(*(following(output, conversation(0, 9, seed=7)) for output in again[:12]))
    outputs = generate(llm, later, requests[:12])
    tiny_oracle.check(outputs, requests[:12])
    # Each request reads one new instruction. Of its earlier tokens, only the last block is computed again.
    assert rows.misses == before + 12
    for output, earlier in zip(outputs, again, strict=False):
        known = len(earlier.prompt_token_ids) + ANSWER - 1
        assert output.num_cached_tokens == known // BLOCK * BLOCK


def test_base_requests_share_what_precedes_the_first_turn(
    llm: Any, tiny_oracle: Oracle, marked: list[ParadeRequest]
) -> None:
    """Base requests and adapters share the six blocks of a document of 200 tokens, and nothing after them.

    Requests with a cache salt share them only with requests of the same salt.
    """
    assert llm.reset_prefix_cache()
    prompts = asked(*(conversation(200, *turns, seed=8) for turns in [(20,), (20,), (20,), (20, 5, 40), (20,)]))
    requests = [None, marked[0], marked[1], marked[0], None]
    cached, shared = [], scheduler(llm).shared_base_tokens
    outputs = []
    for prompt, request in zip(prompts, requests, strict=True):
        (output,) = generate(llm, [prompt], request)
        outputs.append(output)
        cached.append(output.num_cached_tokens)
    tiny_oracle.check(outputs, requests)
    assert cached == [0, 192, 192, 192 + BLOCK, 192]
    assert scheduler(llm).shared_base_tokens - shared == 192 + 192 + 200
    salted = {**prompts[0], "cache_salt": "a tenant's"}
    for request in (None, marked[0]):
        assert generate(llm, [salted], request)[0].num_cached_tokens == (0 if request is None else 192)


def test_a_row_that_was_evicted_is_read_again(llm: Any, tiny_oracle: Oracle, marked: list[ParadeRequest]) -> None:
    prompt, mine = asked(CONVERSATIONS[4]), scheduler(llm)
    (first,) = generate(llm, prompt, marked[0])
    mine.rows.forget()
    (second,) = generate(llm, prompt, marked[0])
    tiny_oracle.check([first, second], [marked[0]] * 2)
    # Turns without vectors are computed again from the second turn's start, which is at a block boundary.
    assert second.num_cached_tokens == 128


def test_scoring_does_not_read_the_answer(llm: Any, tiny_oracle: Oracle, marked: list[ParadeRequest]) -> None:
    """An answer that is sent as part of a prompt has the same log-probabilities as when it was generated."""
    prompt = conversation(10, 20, seed=11)
    for request in marked[:2]:
        (answered,) = generate(llm, asked(prompt), request)
        whole = [*prompt, *answered.outputs[0].token_ids]
        (scored,) = generate(llm, asked(whole), request, 1, prompt_logprobs=1)
        tiny_oracle.check_candidates([scored], [request], 1)
        wanted = [
            step[token].logprob for token, step in zip(whole[len(prompt) :], answered.outputs[0].logprobs, strict=True)
        ]
        found = [
            step[token].logprob for token, step in list(zip(whole, scored.prompt_logprobs, strict=True))[len(prompt) :]
        ]
        assert found == pytest.approx(wanted, abs=TOLERANCE)


def test_several_answers_read_each_turn_once(llm: Any, tiny_oracle: Oracle, marked: list[ParadeRequest]) -> None:
    assert llm.reset_prefix_cache()
    rows = scheduler(llm).rows
    before, steps = rows.misses, []
    record_steps(llm, steps)
    tokens = conversation(30, 60, 20, 60, 20, 60, seed=12)
    params = SamplingParams(n=4, temperature=0.8, max_tokens=6, ignore_eos=True, detokenize=False)
    (output,) = llm.generate(asked(tokens), params, parade_request=marked[0], use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    assert rows.misses == before + 3
    # One request computes the prompt. Each of the others computes its last block.
    assert sum(sum(step.values()) for step in steps) < len(tokens) + 3 * BLOCK + 4 * 6
    alone = generate(llm, asked(tokens), marked[0])
    tiny_oracle.check(alone, [marked[0]])


def test_beam_search_equals_the_reference(llm: Any, tiny_oracle: Oracle, marked: list[ParadeRequest]) -> None:
    """Start tokens that a beam generates start no turn."""
    prompts = asked(CONVERSATIONS[1], CONVERSATIONS[4])
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    answers = llm.beam_search(prompts, params, parade_request=marked[0])
    model = PeftModel.from_pretrained(tiny_oracle.base, marked[0].path)
    try:
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = prompt["prompt_token_ids"]
            wanted = beams(model, tokens, 6)
            served = answer.sequences
            assert [beam.tokens[len(tokens) :] for beam in served] == wanted.sequences[:, len(tokens) :].tolist()
            for beam, score in zip(served, wanted.sequences_scores.tolist(), strict=True):
                assert abs(beam.cum_logprob / 6 - score) <= TOLERANCE
    finally:
        model.unload()


def test_a_hostile_prompt_costs_its_sender_alone(llm: Any, tiny_oracle: Oracle, marked: list[ParadeRequest]) -> None:
    """A prompt has 300 turns of two tokens. Each step reads one of them and leaves room for other requests."""
    hostile, steps = [500, 501] * 300, []
    record_steps(llm, steps)
    prompts = asked(hostile, *CONVERSATIONS[:2], CONVERSATIONS[3])
    requests = [marked[0], marked[0], marked[1], None]
    outputs = generate(llm, prompts, requests, 4)
    tiny_oracle.check(outputs, requests)
    assert [len(step) > 1 for step in steps[:5]] == [True] * 5
    assert len(steps) >= 300


def test_short_of_everything(tiny: str, tiny_oracle: Oracle, marked: list[ParadeRequest]) -> None:
    """No spare row, few blocks, small steps: requests are preempted between turns and inside them."""
    preempted: list[str] = []
    few = {"max_num_seqs": 3, "parade_vector_cache": 0, "max_parades": 1, "num_gpu_blocks_override": 20}
    prompts = asked(*(conversation(10 * n, 20, 10 * n, 30, 9, 25, seed=n) for n in range(8)))
    requests = [marked[number % 3] if number % 4 else None for number in range(8)]
    with tiny_engine(tiny, block_size=BLOCK, max_num_batched_tokens=64, max_model_len=384, **few) as llm:
        record_preemptions(llm, preempted)
        outputs = generate(llm, prompts, requests, 60)
        assert len(scheduler(llm).rows) == 0
    assert any(requests[int(number)] is not None for number in preempted)
    tiny_oracle.check(outputs, requests)
