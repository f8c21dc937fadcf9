# SPDX-License-Identifier: Apache-2.0
"""Models of real sizes with dummy weights, and random adapters for them: for speed measurements only."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from testing.random_models import make_adapter
from vllm_parade.adapter import BaseModelShape
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
    "llama2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "llama3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # Same layout with small sizes, for quick runs on a CPU.
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
# The last ids of every vocabulary mark the turns of conversations; random words are none of them.
NUM_MARKER_TOKENS = 4
CHAT_TEMPLATE = "<s>{% for message in messages %} {{ message['content'] }} </s>{% endfor %}"
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
    """Write `config.json` and a tokenizer for a size; vLLM creates dummy weights."""
    from transformers import LlamaConfig

    sizes = SIZES[size]
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = LlamaConfig(**sizes, head_dim=head_dim, max_position_embeddings=32768, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.torch_dtype = "bfloat16"
    config.save_pretrained(folder)
    make_tokenizer(folder, sizes["vocab_size"])
    return BaseModelShape.from_hf_config(config)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer with one word per token id, words separated by spaces, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(len(SPECIAL_TOKENS), vocab_size))]
    vocab = {word: number for number, word in enumerate(words)}
    unknown, begin, end = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def marker_tokens(size: str) -> dict[str, list[int]]:
    """The keys of an adapter's config that mark turns, for a model size: two tokens each."""
    tokens = list(range(SIZES[size]["vocab_size"]))[-NUM_MARKER_TOKENS:]
    return {"instruction_start_tokens": tokens[:2], "instruction_end_tokens": tokens[2:]}


def make_parades(folder: Path, shape: BaseModelShape, count: int, name: str = "parade", **config: Any) -> list[str]:
    """Write `count` PARADE adapters with different contents and the paper's settings (r = 12, four capsules, q, v, up).

    Existing adapters are kept, so a second run does not write them again.

    Args:
        name: first part of the folders' names
        config: further keys of the adapters' config
    """
    template = folder / f"{name}_template"
    if not (template / WEIGHTS_FILE).exists():
        make_adapter(template, shape, 0, strength=0.02, dtype=torch.bfloat16, **config)
    paths = [folder / f"{name}{number}" for number in range(count)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(_other_content, template), paths, range(count)))
    return [str(path) for path in paths]


def _other_content(adapter: Path, copy: Path, number: int) -> None:
    """Copy an adapter and change one weight, so that the copy has another content hash."""
    if (copy / WEIGHTS_FILE).exists():
        return
    copy.mkdir(exist_ok=True)
    shutil.copyfile(adapter / CONFIG_FILE, copy / CONFIG_FILE)
    # Renamed at the end, so that an interrupted run leaves no incomplete file under the final name.
    draft = copy / "draft"
    shutil.copyfile(adapter / WEIGHTS_FILE, draft)
    with draft.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        # The file's last two bytes are its last bfloat16 number; any finite bit pattern works.
        file.write((0x3C00 + number).to_bytes(2, "little"))
    draft.replace(copy / WEIGHTS_FILE)


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
