# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every architecture that can be trained."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

PAD = 0
COMMON = {"vocab_size": 101, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, **SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**COMMON, **SIZES, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**COMMON, **SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**COMMON, **SIZES, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: GPT2Config(**COMMON, **NO_DROPOUT, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SIZES),
}


def make(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[model_type](), **options).eval()
