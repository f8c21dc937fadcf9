# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk, in PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`."""

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

# The config keys that say how to compute; r, num_capsules and the layers stand in the tensors' names and shapes.
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
    """A validated adapter, on the CPU in the dtype it was stored in."""

    config: AdapterConfig
    generators: dict[int, GeneratorWeights]
    """One a layer, by the layer's number."""
    content_hash: str
    """SHA-256 (hex) of what the adapter computes: equal for a renamed copy, different for any other weight."""
    path: Path

    @property
    def num_parameters(self) -> int:
        """Parameters of all generators, b_up included."""
        tensors = (tensor for weights in self.generators.values() for tensor in weights.named_tensors().values())
        return sum(tensor.numel() for tensor in tensors)


def load_config(path: str | PathLike[str]) -> AdapterConfig:
    """Read the settings of the adapter in folder `path`; its weights stay unread.

    Raises:
        AdapterError: names the file, the key and what was expected.
    """
    folder = Path(path)
    content = read_file(folder, CONFIG_FILE)
    with _naming(folder / CONFIG_FILE):
        try:
            values = json.loads(content)
        # RecursionError is a document nested thousands deep.
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"no valid JSON ({error}); expected a JSON object") from error
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
        path: the folder
        shape: sizes of the base model; None checks only that the adapter agrees with itself
        max_rank: largest r that is served
        sites: sites that are served

    Raises:
        AdapterError: names the file, the tensor or key, what was expected and, where there is one, the remedy.
    """
    folder = Path(path)
    config = load_config(folder)
    with _naming(folder / CONFIG_FILE):
        check_config(config, shape, max_rank, sites)
    # Read once: what is hashed is what was loaded, even while someone replaces the file.
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
    """Write an adapter that `load_adapter` reads; an adapter there before is replaced.

    Args:
        path: the folder, made where it is missing
        config: the adapter's settings
        generators: one a layer, by the layer's number
        layers_path: where the Hugging Face model keeps its decoder layers

    Raises:
        AdapterError: `config` and `generators` do not agree; nothing is written.
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
    # KeyError is a dtype that PyTorch does not know.
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterError(f"no readable safetensors file ({error}); expected a complete one (no pickle)") from error


def _named_tensors(generators: Mapping[int, GeneratorWeights]) -> dict[tuple[int, str], Tensor]:
    layers = sorted(generators)
    return {(layer, name): tensor for layer in layers for name, tensor in generators[layer].named_tensors().items()}


def _storable(tensor: Tensor) -> Tensor:
    # Cloned because safetensors refuses tensors that share memory, as equal initial weights may.
    return tensor.detach().cpu().contiguous().clone()


def _content_hash(config: AdapterConfig, generators: Mapping[int, GeneratorWeights]) -> str:
    tensors = _named_tensors(generators)
    settings = {key: value for key, value in config.to_dict().items() if key in HASHED_KEYS}
    described = [[*key, str(tensor.dtype), list(tensor.shape)] for key, tensor in tensors.items()]
    digest = hashlib.sha256(json.dumps([settings, described], sort_keys=True).encode())
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
