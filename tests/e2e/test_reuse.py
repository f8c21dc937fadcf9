# SPDX-License-Identifier: Apache-2.0
"""What was computed for a prompt under an adapter serves the next request for the same, and nobody else."""

from collections.abc import Iterator
from typing import Any

import pytest
from peft import PeftModel
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from testing.oracle import TOLERANCE, Oracle, beams
from tests.engines import engine, greedy, prompts, scheduler
from vllm_parade import ParadeRequest

pytestmark = pytest.mark.engine

BLOCK = 32


@pytest.fixture(scope="module")
def llm(smollm: str) -> Iterator[Any]:
    # One running request and one spare row.
    with engine(smollm, enable_parade=True, max_num_seqs=2, parade_vector_cache=1, block_size=BLOCK) as llm:
        yield llm


@pytest.fixture
def scheduled(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every step from here on, for an engine that starts with nothing cached."""
    assert llm.reset_prefix_cache()
    mine, steps = scheduler(llm), []
    original = mine.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        steps.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(mine, "schedule", schedule)
    return steps


def counts(llm: Any) -> tuple[int, int, int]:
    rows = scheduler(llm).rows
    return rows.hits, rows.misses, rows.evictions


def since(llm: Any, before: tuple[int, int, int]) -> tuple[int, ...]:
    """Hits, misses and evictions since then."""
    return tuple(now - then for now, then in zip(counts(llm), before, strict=True))


def metrics(llm: Any) -> list[int]:
    """Hits, misses and evictions, as vLLM's metrics tell them."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if "parade" in metric.name}
    return [values[f"vllm:parade_row_{name}"] for name in ("hits", "misses", "evictions")]


def test_a_second_identical_request_reads_almost_nothing(
    llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    question, before, served_before = prompts([512], seed=20), counts(llm), metrics(llm)
    for _ in range(2):
        outputs = llm.generate(question, greedy(), parade_request=variants["strong"], use_tqdm=False)
        oracle.check(outputs, [variants["strong"]])
    assert outputs[0].num_cached_tokens >= 0.9 * 512
    assert since(llm, before) == (1, 1, 0)
    assert [now - then for now, then in zip(metrics(llm), served_before, strict=True)] == [1, 1, 0]


def test_a_second_turn_with_the_same_instruction(
    llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    """A system prompt as instruction: conversations that begin with it share its vectors, keys and values."""
    strong = variants["strong"]
    request = ParadeRequest("system", strong.path, instruction_tokens=128)
    whole, before = prompts([200], seed=21)[0]["prompt_token_ids"], counts(llm)
    other = [*whole[:128], *prompts([60], seed=22)[0]["prompt_token_ids"]]
    asked = [{"prompt_token_ids": tokens} for tokens in (whole[:150], whole, other)]
    outputs = [llm.generate([one], greedy(), parade_request=request, use_tqdm=False)[0] for one in asked]
    oracle.check(outputs, [request] * 3)
    assert [output.num_cached_tokens >= 128 for output in outputs] == [False, True, True]
    assert since(llm, before) == (2, 1, 0)


def test_an_evicted_row_is_read_again_whole(
    llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    """Its keys and values are still cached, but without the row they count for nothing."""
    a, b = variants["strong"], variants["strong2"]
    questions, before = prompts([100, 40, 41, 42], seed=23), counts(llm)
    for question, request in zip([*questions, questions[0]], [a, b, b, b, a], strict=True):
        outputs = llm.generate([question], greedy(), parade_request=request, use_tqdm=False)
        oracle.check(outputs, [request])
    assert outputs[0].num_cached_tokens == 0
    hits, misses, evictions = since(llm, before)
    assert (hits, misses) == (0, 5)
    assert evictions >= 2


def test_answers_to_one_prompt_cost_one_prefill(
    llm: Any, variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    """n = 8, two at a time."""
    before = counts(llm)
    params = SamplingParams(n=8, temperature=1.5, seed=3, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate(prompts([512], seed=24), params, parade_request=variants["strong"], use_tqdm=False)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    assert since(llm, before) == (7, 1, 0)
    # The prompt once; of the others' at most what follows its last full block, and every answer.
    assert sum(scheduled) <= 512 + 7 * BLOCK + 8 * 4


@pytest.mark.parametrize("twins", [True, False])
def test_an_abort_gives_its_row_back(
    llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest], scheduled: list[int], twins: bool
) -> None:
    """More aborts than there are rows. The other request goes on, also where it held the same row."""
    strong, rows = variants["strong"], scheduler(llm).rows
    outputs: list[Any] = []
    for seed in range(26, 30):
        asked = prompts([50], seed=seed) * 2 if twins else prompts([50, 40], seed=seed)
        names = llm.enqueue(asked, greedy(), parade_request=strong, use_tqdm=False)
        for _ in range(4):
            llm.llm_engine.step()
        assert len(rows) == (1 if twins else 2)
        llm.llm_engine.abort_request(names[1:], internal=True)
        assert len(rows) == 1
        outputs += llm.wait_for_completion(use_tqdm=False)
        assert len(rows) == 0
        # Asked again, the one that was aborted is answered from what it left behind.
        outputs += llm.generate(asked[1:], greedy(), parade_request=strong, use_tqdm=False)
        assert outputs[-1].num_cached_tokens >= BLOCK
    oracle.check(outputs, [strong] * 8)


def test_beam_search_equals_the_reference(
    smollm: str, oracle: Oracle, variants: dict[str, ParadeRequest], trained: dict[str, ParadeRequest]
) -> None:
    """Ten prompts together, the same beams with the same scores; each instruction is read by a generator once."""
    lengths = [5, 17, 33, 64, 65, 100, 150, 200, 257, 300]
    requests = [variants["strong"], trained["sst2"]] * 5
    asked = prompts(lengths, seed=25)
    with engine(smollm, enable_parade=True, block_size=BLOCK) as llm:
        params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
        answers = llm.beam_search(asked, params, parade_request=requests)
        hits, misses, evictions = counts(llm)
    assert (misses, evictions) == (10, 0)
    # Five more steps of three beams each.
    assert hits == 10 * 5 * 3
    for request in (variants["strong"], trained["sst2"]):
        model = PeftModel.from_pretrained(oracle.base, request.path)
        try:
            for question, answer, other in zip(asked, answers, requests, strict=True):
                if other is request:
                    compare_beams(model, question["prompt_token_ids"], answer.sequences)
        finally:
            model.unload()


def compare_beams(model: Any, prompt: list[int], served: list[Any]) -> None:
    wanted = beams(model, prompt, 6)
    assert [beam.tokens[len(prompt) :] for beam in served] == wanted.sequences[:, len(prompt) :].tolist()
    # Both are means over the answer's tokens, the reference's by its length penalty of one.
    for beam, score in zip(served, wanted.sequences_scores.tolist(), strict=True):
        assert abs(beam.cum_logprob / 6 - score) <= TOLERANCE
