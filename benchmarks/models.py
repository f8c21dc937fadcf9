# SPDX-License-Identifier: Apache-2.0
"""Models of real sizes with dummy weights, and random adapters for them: good for speed, never for quality."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_parade.adapter import AdapterConfig, BaseModelShape, initial_generator, save_adapter
from vllm_parade.adapter.folder import CONFIG_FILE, WEIGHTS_FILE

SIZES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # For a try on a CPU: the layout, not the sizes.
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}
LORA_MODULES = {
    "self_attn.q_proj": ("hidden", "q"),
    "self_attn.k_proj": ("hidden", "k"),
    "self_attn.v_proj": ("hidden", "v"),
    "self_attn.o_proj": ("q", "hidden"),
    "mlp.gate_proj": ("hidden", "gate"),
    "mlp.up_proj": ("hidden", "up"),
    "mlp.down_proj": ("up", "hidden"),
}
LORA_RANK = 4


def make_model(folder: Path, size: str) -> BaseModelShape:
    """Write a `config.json` of this size; vLLM fills in dummy weights."""
    from transformers import LlamaConfig

    sizes = SIZES[size]
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = LlamaConfig(**sizes, head_dim=head_dim, max_position_embeddings=32768, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.torch_dtype = "bfloat16"
    config.save_pretrained(folder)
    return BaseModelShape.from_hf_config(config)


def make_parades(folder: Path, shape: BaseModelShape, count: int) -> list[str]:
    """Write `count` PARADE adapters of the paper's setting (r = 12, four capsules, q, v, up) that differ in content."""
    config = AdapterConfig()
    random = torch.Generator().manual_seed(0)
    generators = {}
    for layer in range(shape.num_layers):
        weights = initial_generator(config, shape, random)
        weights.up.normal_(0, 0.02, generator=random)
        generators[layer] = weights.to("cpu", torch.bfloat16)
    first = folder / "parade0"
    save_adapter(first, config, generators)
    return [str(first), *(str(_other_content(first, folder / f"parade{number}", number)) for number in range(1, count))]


def _other_content(adapter: Path, copy: Path, number: int) -> Path:
    """A copy that differs in one weight, which makes it another adapter to everybody who compares contents."""
    copy.mkdir(exist_ok=True)
    (copy / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    content = bytearray((adapter / WEIGHTS_FILE).read_bytes())
    # The file's last two bytes are the last bfloat16 number: any bits below infinity's will do.
    content[-2:] = (0x3C00 + number).to_bytes(2, "little")
    (copy / WEIGHTS_FILE).write_bytes(content)
    return copy


def make_loras(folder: Path, shape: BaseModelShape, count: int) -> list[str]:
    """Write `count` LoRA adapters of rank 4 on all seven linear modules (10.0M parameters at LLaMA-2 7B)."""
    widths = {"hidden": shape.hidden_size, **shape.widths}
    tensors = {}
    for layer in range(shape.num_layers):
        for module, (inputs, outputs) in LORA_MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(LORA_RANK, widths[inputs], dtype=torch.bfloat16) * 0.02
            tensors[f"{name}.lora_B.weight"] = torch.randn(widths[outputs], LORA_RANK, dtype=torch.bfloat16) * 0.02
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": sorted(module.rsplit(".", 1)[-1] for module in LORA_MODULES),
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    paths = []
    for number in range(count):
        path = folder / f"lora{number}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(str(path))
    return paths
