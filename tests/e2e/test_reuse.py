# SPDX-License-Identifier: Apache-2.0
"""Vectors and KV blocks are reused by requests with the same instruction and adapter, and by no others."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from testing.oracle import Oracle
from tests.engines import scheduler, tiny_engine, tiny_greedy, tiny_prompts
from vllm_parade import ParadeRequest

pytestmark = pytest.mark.engine

BLOCK = 32


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[Any]:
    # Two running requests and one spare row.
    with tiny_engine(tiny, max_num_seqs=2, parade_vector_cache=1, block_size=BLOCK) as llm:
        yield llm


@pytest.fixture
def scheduled(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Empty the engine's caches, then record the number of scheduled tokens of every step."""
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
    """Hits, misses and evictions since `before`."""
    return tuple(now - then for now, then in zip(counts(llm), before, strict=True))


def metrics(llm: Any) -> list[int]:
    """Hits, misses and evictions from vLLM's metrics."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if "parade" in metric.name}
    return [values[f"vllm:parade_row_{name}"] for name in ("hits", "misses", "evictions")]


def test_a_second_identical_request_reads_almost_nothing(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    question, before, served_before = tiny_prompts([512], seed=20), counts(llm), metrics(llm)
    for _ in range(2):
        outputs = llm.generate(question, tiny_greedy(), parade_request=tiny_variants["strong"], use_tqdm=False)
        tiny_oracle.check(outputs, [tiny_variants["strong"]])
    assert outputs[0].num_cached_tokens >= 0.9 * 512
    assert since(llm, before) == (1, 1, 0)
    assert [now - then for now, then in zip(metrics(llm), served_before, strict=True)] == [1, 1, 0]


def test_a_second_turn_with_the_same_instruction(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    """The instruction is a system prompt. Conversations that start with it share its vectors, keys and values."""
    strong = tiny_variants["strong"]
    request = ParadeRequest("system", strong.path, instruction_tokens=128)
    whole, before = tiny_prompts([200], seed=21)[0]["prompt_token_ids"], counts(llm)
    other = [*whole[:128], *tiny_prompts([60], seed=22)[0]["prompt_token_ids"]]
    asked = [{"prompt_token_ids": tokens} for tokens in (whole[:150], whole, other)]
    outputs = [llm.generate([one], tiny_greedy(), parade_request=request, use_tqdm=False)[0] for one in asked]
    tiny_oracle.check(outputs, [request] * 3)
    assert [output.num_cached_tokens >= 128 for output in outputs] == [False, True, True]
    assert since(llm, before) == (2, 1, 0)


def test_an_evicted_row_is_read_again_whole(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    """Its keys and values are still cached, but they are not reused without the row."""
    a, b = tiny_variants["strong"], tiny_variants["strong2"]
    questions, before = tiny_prompts([100, 40, 41, 42], seed=23), counts(llm)
    for question, request in zip([*questions, questions[0]], [a, b, b, b, a], strict=True):
        outputs = llm.generate([question], tiny_greedy(), parade_request=request, use_tqdm=False)
        tiny_oracle.check(outputs, [request])
    assert outputs[0].num_cached_tokens == 0
    hits, misses, evictions = since(llm, before)
    assert (hits, misses) == (0, 5)
    assert evictions >= 2


def test_answers_to_one_prompt_cost_one_prefill(
    llm: Any, tiny_variants: dict[str, ParadeRequest], scheduled: list[int]
) -> None:
    """n = 8, two running at a time."""
    before = counts(llm)
    params = SamplingParams(n=8, temperature=1.5, seed=3, max_tokens=4, ignore_eos=True, detokenize=False)
    (output,) = llm.generate(
        tiny_prompts([512], seed=24), params, parade_request=tiny_variants["strong"], use_tqdm=False
    )
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    assert since(llm, before) == (7, 1, 0)
    # The prompt once, for each other answer at most the tokens after the last full block, and the answers' tokens.
    assert sum(scheduled) <= 512 + 7 * BLOCK + 8 * 4


@pytest.mark.parametrize("twins", [True, False])
def test_an_abort_gives_its_row_back(
    llm: Any, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], scheduled: list[int], twins: bool
) -> None:
    """There are more aborts than rows. The other request continues, even if it holds the same row."""
    strong, rows = tiny_variants["strong"], scheduler(llm).rows
    outputs: list[Any] = []
    for seed in range(26, 30):
        asked = tiny_prompts([50], seed=seed) * 2 if twins else tiny_prompts([50, 40], seed=seed)
        names = llm.enqueue(asked, tiny_greedy(), parade_request=strong, use_tqdm=False)
        for _ in range(4):
            llm.llm_engine.step()
        assert len(rows) == (1 if twins else 2)
        llm.llm_engine.abort_request(names[1:], internal=True)
        assert len(rows) == 1
        outputs += llm.wait_for_completion(use_tqdm=False)
        assert len(rows) == 0
        # Sent again, the aborted request reuses its cached blocks.
        outputs += llm.generate(asked[1:], tiny_greedy(), parade_request=strong, use_tqdm=False)
        assert outputs[-1].num_cached_tokens >= BLOCK
    tiny_oracle.check(outputs, [strong] * 8)
