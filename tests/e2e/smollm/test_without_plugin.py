"""The base model's requests are served as if there were no plugin."""

from typing import Any

import pytest

from tests.engines import greedy, prompts
from vllm_parade import ParadeRequest
from vllm_parade.config import ServingConfig

pytestmark = pytest.mark.engine

LENGTHS = [5, 40, 90, 150, 33, 64]


def logprobs(outputs: list[Any]) -> list[Any]:
    """Every candidate token of every step with its log-probability, to the last bit."""
    return [output.outputs[0].logprobs for output in outputs]


def test_base_rows_are_bit_identical_to_an_engine_without_the_plugin(
    request: pytest.FixtureRequest, variants: dict[str, ParadeRequest]
) -> None:
    requests = [None, variants["strong"], None, variants["five"], variants["last"], None]
    llm = request.getfixturevalue("llm")
    assert llm.reset_prefix_cache()
    mixed = logprobs(llm.generate(prompts(LENGTHS), greedy(), parade_request=requests, use_tqdm=False))
    unused = logprobs(llm.generate(prompts(LENGTHS, seed=1), greedy(), use_tqdm=False))
    plain = request.getfixturevalue("plain")
    assert not ServingConfig.from_vllm_config(plain.llm_engine.vllm_config).enable_parade
    base = logprobs(plain.generate(prompts(LENGTHS), greedy(), use_tqdm=False))
    base_unused = logprobs(plain.generate(prompts(LENGTHS, seed=1), greedy(), use_tqdm=False))
    assert unused == base_unused
    # The same batch, so the same shapes in every matrix product: only the adapters' rows may differ.
    for adapter, served, wanted in zip(requests, mixed, base, strict=True):
        assert (served == wanted) == (adapter is None)
