"""vLLM's answers equal those of the float32 oracle, whatever else is in the batch."""

import ast
from itertools import cycle
from typing import Any

import pytest

from testing.oracle import Oracle
from testing.random_models import make_adapter
from tests.documents import ROOT, texts
from tests.engines import greedy, prompts
from vllm_parade import ParadeRequest
from vllm_parade.adapter import SITES, BaseModelShape
from vllm_parade.config import ServingConfig

pytestmark = pytest.mark.engine

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Lengths around multiples of a block, and between them. Most are short: the oracle takes most of the time, and its time
# grows with the number of tokens.
SHORT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 27, 30]
LENGTHS = [31, 32, 33, 34, 40, 47, 48, 49, 55, 60, 63, 64, 65, 66, 70, 77]
LONG = [95, 96, 97, 127, 128, 129, 256, 257]
ALL = [*SHORT, *LENGTHS, *LONG]


def shuffled(values: list[Any]) -> list[Any]:
    """A fixed order that mixes long and short."""
    return values[::2][::-1] + values[1::2]


def test_trained_and_strong_adapters_and_base_in_one_batch(
    llm: Any, oracle: Oracle, trained: dict[str, ParadeRequest], variants: dict[str, ParadeRequest]
) -> None:
    assert len(ALL) >= 48
    kinds = cycle([None, trained["sst2"], variants["strong"], trained["e2e"], variants["strong2"]])
    requests = [next(kinds) for _ in ALL]
    outputs = llm.generate(prompts(shuffled(ALL)), greedy(), parade_request=requests, use_tqdm=False)
    oracle.check(outputs, requests)


def test_every_kind_of_adapter_in_one_batch(llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest]) -> None:
    kinds = cycle([*variants.values(), None])
    lengths = SHORT[::4] + LENGTHS[::2] + LONG[2:7:2]
    requests = [next(kinds) for _ in lengths]
    outputs = llm.generate(prompts(lengths, seed=1), greedy(), parade_request=requests, use_tqdm=False)
    oracle.check(outputs, requests)


def test_same_prompt_and_common_prefixes_under_prefix_caching(
    llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest]
) -> None:
    assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    whole = prompts([104], seed=2)[0]["prompt_token_ids"]
    asked = [{"prompt_token_ids": whole[:n]} for n in (104, 104, 104, 80, 80, 64, 64, 104)]
    a, b = variants["strong"], variants["routing"]
    requests = [None, a, b, a, None, b, a, a]
    for _ in range(2):
        outputs = llm.generate(asked, greedy(), parade_request=requests, use_tqdm=False)
        oracle.check(outputs, requests)
    # All full blocks were cached by the first round, each for its own adapter.
    block = llm.llm_engine.vllm_config.cache_config.block_size
    # A prompt's last token is computed in any case.
    assert [output.num_cached_tokens for output in outputs] == [
        (len(one["prompt_token_ids"]) - 1) // block * block for one in asked
    ]


def test_instruction_shorter_than_the_prompt(llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest]) -> None:
    request = ParadeRequest("strong", variants["strong"].path, instruction_tokens=11)
    outputs = llm.generate(prompts([40], seed=5), greedy(), parade_request=request, use_tqdm=False)
    oracle.check(outputs, [request])


def test_several_answers_to_one_prompt(llm: Any, oracle: Oracle, variants: dict[str, ParadeRequest]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(n=3, temperature=0.8, seed=7, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate(prompts([50], seed=6), params, parade_request=variants["strong"], use_tqdm=False)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    alone = llm.generate(prompts([50], seed=6), greedy(), parade_request=variants["strong"], use_tqdm=False)
    oracle.check(alone, [variants["strong"]])


def test_fresh_adapter_changes_nothing(llm: Any, smollm_shape: BaseModelShape, tmp_path: Any) -> None:
    fresh = make_adapter(tmp_path / "fresh", smollm_shape, 0, strength=0.0, sites=SITES)
    asked = prompts([7, 30, 120], seed=8)
    base = llm.generate(asked, greedy(), use_tqdm=False)
    adapted = llm.generate(asked, greedy(), parade_request=fresh, use_tqdm=False)
    assert [o.outputs[0].logprobs for o in base] == [o.outputs[0].logprobs for o in adapted]


def test_chat(llm: Any, oracle: Oracle, trained: dict[str, ParadeRequest]) -> None:
    messages = [[{"role": "user", "content": text}] for text in ("a gripping movie", "What is 2 + 2?")]
    requests = [trained["sst2"], None]
    outputs = llm.chat(messages, greedy(), parade_request=requests, use_tqdm=False)
    oracle.check(outputs, requests)


def printed(page: str, test: str, llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    """Run a page's Python code with this engine instead of a new one, and return the lines that it prints."""
    from vllm.engine.arg_utils import EngineArgs

    folder = llm.llm_engine.vllm_config.model_config.model

    def made(model: str, **options: Any) -> Any:
        assert model == HUB_NAME
        assert ServingConfig.from_dict(EngineArgs(folder, **options).additional_config["parade"]).enable_parade
        return llm

    monkeypatch.setattr("vllm.LLM", made)
    monkeypatch.chdir(ROOT)
    (text,) = texts(page, f"tests/e2e/smollm/test_exactness.py::{test}", "python")
    exec(text, {})
    return capsys.readouterr().out.splitlines()


def test_the_lines_of_the_readme(llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    line = printed("README.md", "test_the_lines_of_the_readme", llm, monkeypatch, capsys)[-1]
    base, sst2 = ast.literal_eval(line)
    assert sst2 == "positive"
    assert base != sst2


def test_the_lines_of_the_page_on_serving(llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert printed("docs/serving.md", "test_the_lines_of_the_page_on_serving", llm, monkeypatch, capsys)
