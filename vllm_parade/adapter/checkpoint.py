# SPDX-License-Identifier: Apache-2.0
"""Reads and writes adapters in PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vllm_parade.adapter.config import AdapterConfig, AdapterError
from vllm_parade.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, read_file, write_files
from vllm_parade.adapter.validation import DEFAULT_LAYERS_PATH, check_config, check_tensors, tensor_name
from vllm_parade.adapter.weights import BaseModelShape, GeneratorWeights

# Config keys that change what an adapter computes. Tensor names and shapes cover r, num_capsules and the layers.
HASHED_KEYS = (
    "pooler",
    "activation",
    "sites",
    "generator_input",
    "instruction_start_tokens",
    "instruction_end_tokens",
    "instruction_max_tokens",
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter, on the CPU in its stored dtype."""

    config: AdapterConfig
    generators: dict[int, GeneratorWeights]
    """One generator per layer, by layer number."""
    content_hash: str
    """SHA-256 (hex) of all tensors and of the settings in HASHED_KEYS. A renamed copy has the same hash."""
    path: Path

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all generators, including b_up."""
        tensors = (tensor for weights in self.generators.values() for tensor in weights.named_tensors().values())
        return sum(tensor.numel() for tensor in tensors)


def load_config(path: str | PathLike[str]) -> AdapterConfig:
    """Read the settings of the adapter in folder `path`, without its weights.

    Raises:
        AdapterError: names the file, the key and what was expected.
    """
    folder = Path(path)
    content = read_file(folder, CONFIG_FILE)
    with _naming(folder / CONFIG_FILE):
        try:
            values = json.loads(content)
        # Deeply nested JSON raises RecursionError.
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"not valid JSON ({error}); expected a JSON object") from error
        if not isinstance(values, dict):
            raise AdapterError(f"holds a JSON {type(values).__name__}; expected an object")
        return AdapterConfig.from_dict(values)


def load_adapter(
    path: str | PathLike[str],
    shape: BaseModelShape | None = None,
    *,
    max_rank: int | None = None,
    sites: Sequence[str] | None = None,
) -> Adapter:
    """Read and validate the adapter in folder `path`.

    Args:
        path: the adapter's folder
        shape: sizes of the base model; with None, only the adapter's own consistency is checked
        max_rank: largest r to accept; None accepts any
        sites: sites to accept; None accepts all

    Raises:
        AdapterError: names the file, the tensor or key, what was expected and, if there is one, the remedy.
    """
    folder = Path(path)
    config = load_config(folder)
    with _naming(folder / CONFIG_FILE):
        check_config(config, shape, max_rank, sites)
    # Read once into memory, so the hash matches the loaded tensors even if the file is replaced meanwhile.
    content = read_file(folder, WEIGHTS_FILE)
    with _naming(folder / WEIGHTS_FILE):
        generators = check_tensors(config, _parse(content), shape)
    return Adapter(config, generators, _content_hash(config, generators), folder)


def save_adapter(
    path: str | PathLike[str],
    config: AdapterConfig,
    generators: Mapping[int, GeneratorWeights],
    *,
    layers_path: str = DEFAULT_LAYERS_PATH,
) -> None:
    """Write an adapter that `load_adapter` can read. Replaces an adapter that is already in the folder.

    Args:
        path: the adapter's folder; created if missing
        config: the adapter's settings
        generators: one per layer, by layer number
        layers_path: path of the decoder layers in the Hugging Face model

    Raises:
        AdapterError: `config` and `generators` do not match. Nothing is written.
    """
    folder = Path(path)
    named = _named_tensors(generators)
    tensors = {tensor_name(layers_path, layer, name): _storable(tensor) for (layer, name), tensor in named.items()}
    with _naming(folder / WEIGHTS_FILE):
        check_tensors(config, tensors, None)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_files(folder, {WEIGHTS_FILE: weights, CONFIG_FILE: text.encode()})


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error


def _parse(content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    # A dtype that PyTorch does not know raises KeyError.
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterError(f"not a readable safetensors file ({error}); expected a complete one (no pickle)") from error


def _named_tensors(generators: Mapping[int, GeneratorWeights]) -> dict[tuple[int, str], Tensor]:
    layers = sorted(generators)
    return {(layer, name): tensor for layer in layers for name, tensor in generators[layer].named_tensors().items()}


def _storable(tensor: Tensor) -> Tensor:
    # Cloned, because safetensors refuses tensors that share memory, as equal initial weights may do.
    return tensor.detach().cpu().contiguous().clone()


def _content_hash(config: AdapterConfig, generators: Mapping[int, GeneratorWeights]) -> str:
    tensors = _named_tensors(generators)
    settings = {key: value for key, value in config.to_dict().items() if key in HASHED_KEYS}
    described = [[*key, str(tensor.dtype), list(tensor.shape)] for key, tensor in tensors.items()]
    digest = hashlib.sha256(json.dumps([settings, described], sort_keys=True).encode())
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
