"""Every architecture that startup accepts is exact, as a random model of three layers."""

from itertools import cycle
from pathlib import Path

import pytest

from testing.oracle import Oracle
from testing.random_models import INNER, make_adapter, make_tiny_model
from tests.engines import engine, greedy, prompts
from vllm_parade.adapter import SITES

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_exact(architecture: str, tmp_path: Path) -> None:
    from vllm_parade.frontend.startup import ARCHITECTURES

    assert architecture in ARCHITECTURES
    model = str(tmp_path / "model")
    # Random biases and norms: zeros and ones would hide an error.
    shape = make_tiny_model(tmp_path / "model", architecture, one_dimensional=0.2)
    a = make_adapter(tmp_path / "a", shape, 1, inner=INNER)
    five = make_adapter(tmp_path / "five", shape, 2, inner=INNER, sites=SITES, generator_input="attention_input")
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 120, 200]
    kinds = cycle([None, a, five])
    requests = [next(kinds) for _ in lengths]
    with engine(model, enable_parade=True, parade_sites=SITES, skip_tokenizer_init=True) as llm:
        outputs = llm.generate(
            prompts(lengths, vocab=512), greedy(detokenize=False), parade_request=requests, use_tqdm=False
        )
    Oracle(model).check(outputs, requests)
