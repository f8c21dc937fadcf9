# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters together with adapters: answers are correct, both computed and from the caches."""

import json
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from testing.oracle import Oracle, Rule
from tests import rules
from tests.engines import Asked, answered_twice, greedy
from vllm_parade import ParadeRequest
from vllm_parade.train.templates import SST2_ANSWERS, e2e_prompt, sst2_prompt

pytestmark = pytest.mark.engine

BLOCK = 32
FREE = 10
SENTIMENT = {"type": "object", "properties": {"sentiment": {"enum": list(SST2_ANSWERS)}}, "required": ["sentiment"]}
REVIEW = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "stars": {"type": "integer", "enum": [1, 2, 3, 4, 5]}},
    "required": ["name", "stars"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def asked(llm: Any, trained: dict[str, ParadeRequest], variants: dict[str, ParadeRequest]) -> Asked:
    """Two questions, each for the base model, for the adapter trained on the task and for a random adapter."""
    texts = [
        sst2_prompt("a warm and funny film that never talks down to its audience ."),
        e2e_prompt("name[Sea Lantern], eatType[restaurant], priceRange[high], customer rating[5 out of 5]"),
    ]
    template = llm.get_tokenizer().apply_chat_template
    options = {"add_generation_prompt": True, "return_dict": False}
    first, second = ({"prompt_token_ids": template([{"role": "user", "content": text}], **options)} for text in texts)
    requests = [None, trained["sst2"], variants["strong"], None, trained["e2e"], variants["strong2"]]
    return [first] * 3 + [second] * 3, requests


@pytest.fixture(scope="module")
def free(llm: Any, oracle: Oracle, asked: Asked) -> list[list[int]]:
    """Greedy answers to the same questions without other parameters, one per question."""
    outputs, requests = twice(llm, asked, greedy(FREE))
    oracle.check(outputs, requests)
    decode = llm.get_tokenizer().decode
    assert [output.outputs[0].text for output in outputs] == [text(decode, answer) for answer in tokens(outputs)]
    return tokens(outputs)[: len(outputs) // 2]


def twice(llm: Any, asked: Asked, params: Any) -> tuple[list[Any], list[ParadeRequest | None]]:
    return answered_twice(llm, asked, params, block_size=BLOCK)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def text(decode: Any, answer: list[int]) -> str:
    return str(decode(answer, skip_special_tokens=True))


def test_candidates_of_every_step(llm: Any, oracle: Oracle, asked: Asked) -> None:
    oracle.check_candidates(*twice(llm, asked, greedy(logprobs=5)), 5)


def cases(llm: Any) -> dict[str, tuple[dict[str, Any], Rule]]:
    """Sampling parameters, and the rule by which the oracle changes logits for them."""
    encode = llm.get_tokenizer().encode
    bias = dict.fromkeys(range(1000, 3000), 4.0)
    words = ["is", "positive", "Sea Lantern"]
    spelled = [encode(space + word, add_special_tokens=False) for word in words for space in ("", " ")]
    return {
        "bias": ({"logit_bias": bias}, rules.add(bias)),
        "allowed": ({"allowed_token_ids": list(range(1000, 5000))}, rules.allow(range(1000, 5000))),
        "bad words": ({"bad_words": words}, rules.avoid(spelled)),
        "penalties": (
            {"repetition_penalty": 1.3, "frequency_penalty": 0.6, "presence_penalty": 0.9},
            rules.penalise(1.3, 0.6, 0.9),
        ),
    }


@pytest.mark.parametrize("name", ["bias", "allowed", "bad words", "penalties"])
def test_changed_logits(llm: Any, oracle: Oracle, asked: Asked, free: list[list[int]], name: str) -> None:
    options, rule = cases(llm)[name]
    outputs, requests = twice(llm, asked, greedy(FREE, **options))
    oracle.check(outputs, requests, rule)
    changed = [answer != other for answer, other in zip(tokens(outputs), free * 2, strict=True)]
    # If no answer changed, the test would show nothing.
    assert sum(changed) >= len(changed) / 2


def test_least_and_last_tokens(llm: Any, oracle: Oracle, asked: Asked, free: list[list[int]]) -> None:
    end = llm.get_tokenizer().eos_token_id
    # The trained adapter's answer is one word. The other answers end with a stop token.
    assert free[1][1] == end
    least, stops = 5, {end, *(answer[2] for answer in free)}
    params = SamplingParams(
        temperature=0, max_tokens=FREE, min_tokens=least, stop_token_ids=sorted(stops - {end}), logprobs=1
    )
    outputs, requests = twice(llm, asked, params)
    oracle.check(outputs, requests, rules.forbid(stops, until=least))
    for answer in tokens(outputs):
        assert len(answer) > least
        assert not stops & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == FREE


def test_stop_tokens(llm: Any, asked: Asked, free: list[list[int]]) -> None:
    stops = {answer[2] for answer in free}
    outputs, _ = twice(llm, asked, greedy(FREE, stop_token_ids=sorted(stops)))
    for output, answer in zip(outputs, free * 2, strict=True):
        completion = output.outputs[0]
        at = next(number for number, token in enumerate(answer) if token in stops)
        assert list(completion.token_ids) == answer[: at + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", answer[at])


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(llm: Any, asked: Asked, free: list[list[int]], include: bool) -> None:
    """The stop string is three characters from the middle of each answer, regardless of token borders."""
    decode = llm.get_tokenizer().decode
    texts = [text(decode, answer) for answer in free]
    stops = [whole[len(whole) // 2 - 1 :][:3] for whole in texts]
    params = [greedy(FREE, stop=stop, include_stop_str_in_output=include) for stop in stops]
    outputs, _ = twice(llm, asked, params)
    for output, answer, whole, stop in zip(outputs, free * 2, texts * 2, stops * 2, strict=True):
        completion = output.outputs[0]
        assert completion.text == whole[: whole.index(stop) + include * len(stop)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        said = [stop in text(decode, answer[:count]) for count in range(FREE + 1)]
        assert list(completion.token_ids) == answer[: said.index(True)]


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        ({"choice": ["positive", "negative", "It is neither"]}, ["positive", "negative", "It is neither"]),
        ({"regex": "(good|bad), [1-5]"}, [f"{word}, {stars}" for word in ("good", "bad") for stars in range(1, 6)]),
        ({"json": SENTIMENT}, [json.dumps({"sentiment": word}, separators=(",", ":")) for word in SST2_ANSWERS]),
    ],
    ids=["choice", "regex", "json"],
)
def test_one_of_a_grammars_texts(
    llm: Any, oracle: Oracle, asked: Asked, constraint: dict[str, Any], texts: list[str]
) -> None:
    grammar = StructuredOutputsParams(**constraint)
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=1, structured_outputs=grammar)
    outputs, requests = twice(llm, asked, params)
    assert {output.outputs[0].text for output in outputs} <= set(texts)
    oracle.check(outputs, requests, rules.one_of(texts, llm.get_tokenizer()), grammar=True)


def test_json_of_a_schema(llm: Any, asked: Asked) -> None:
    grammar = StructuredOutputsParams(json=REVIEW)
    outputs, _ = twice(llm, asked, SamplingParams(temperature=0, max_tokens=64, structured_outputs=grammar))
    assert tokens(outputs)[:6] == tokens(outputs)[6:]
    for output in outputs:
        review = json.loads(output.outputs[0].text)
        assert set(review) == {"name", "stars"}
        assert len(review["name"]) <= 12
        assert review["stars"] in range(1, 6)


def test_seeded_answers_are_those_of_the_request_alone(llm: Any, oracle: Oracle, asked: Asked) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=7, max_tokens=8, ignore_eos=True, logprobs=3)
    together, requests = twice(llm, asked, params)
    oracle.check_candidates(together, requests, 3)
    alone = []
    for question, request in zip(*asked, strict=True):
        alone += tokens(llm.generate([question], params, parade_request=request, use_tqdm=False))
    assert tokens(together) == alone * 2
    # One seed, six answers.
    assert len(set(map(tuple, alone))) == 6
