# SPDX-License-Identifier: Apache-2.0
"""Beam search under adapters gives the reference's beams."""

from typing import Any

import pytest
from peft import PeftModel
from vllm.sampling_params import BeamSearchParams

from testing.oracle import TOLERANCE, Oracle, beams
from tests.engines import prompts, scheduler
from vllm_parade import ParadeRequest

pytestmark = pytest.mark.engine


def test_beam_search_equals_the_reference(
    llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest], trained: dict[str, ParadeRequest]
) -> None:
    """Ten prompts at once give the reference's beams and scores. A generator reads each instruction once."""
    lengths = [5, 17, 31, 32, 33, 64, 65, 90, 100, 129]
    requests = [variants["strong"], trained["sst2"]] * 5
    asked = prompts(lengths, seed=25)
    assert llm.reset_prefix_cache()
    rows = scheduler(llm).rows
    before = rows.hits, rows.misses, rows.evictions
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    answers = llm.beam_search(asked, params, parade_request=requests)
    # Five more steps of three beams each.
    assert (rows.hits, rows.misses, rows.evictions) == (before[0] + 10 * 5 * 3, before[1] + 10, before[2])
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
    # Both scores are means over the answer's tokens: the reference uses a length penalty of one.
    for beam, score in zip(served, wanted.sequences_scores.tolist(), strict=True):
        assert abs(beam.cum_logprob / 6 - score) <= TOLERANCE
