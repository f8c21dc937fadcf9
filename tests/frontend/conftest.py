# SPDX-License-Identifier: Apache-2.0
"""A model folder without weights. An engine's config and its input processor are created from it in milliseconds."""

import pytest

from testing.random_models import make_adapter
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape


@pytest.fixture(scope="session")
def hf_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, hf_config) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    hf_config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, hf_config) -> dict[str, ParadeRequest]:
    """Adapters on disk by name: two with the default sites, one with all five."""
    folder = tmp_path_factory.mktemp("adapters")
    shape = BaseModelShape.from_hf_config(hf_config)
    kinds = {"a": {}, "b": {"r": 8}, "five": {"sites": ("q", "k", "v", "gate", "up")}}
    return {name: make_adapter(folder / name, shape, seed, **kind) for seed, (name, kind) in enumerate(kinds.items())}


@pytest.fixture
def engine_config(model):
    """A function that creates an engine's config from keywords of `EngineArgs`."""
    from vllm.engine.arg_utils import EngineArgs

    def make(**options):
        return EngineArgs(**{"model": model, "skip_tokenizer_init": True, **options}).create_engine_config()

    return make
