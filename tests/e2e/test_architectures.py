"""Every architecture that startup lets in, as a random model of three layers: exact."""

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import INNER, make_adapter
from tests.engines import engine, greedy, prompts
from tests.oracle import Oracle
from vllm_parade.adapter import SITES, BaseModelShape

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_model(folder: Path, architecture: str) -> str:
    import transformers

    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES))
    for parameter in model.parameters():
        # Biases and norms start as zeros and ones, where nobody would notice them.
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_exact(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from vllm_parade.frontend.startup import ARCHITECTURES

    assert architecture in ARCHITECTURES
    model = make_model(tmp_path / "model", architecture)
    shape = BaseModelShape.from_hf_config(AutoConfig.from_pretrained(model))
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
