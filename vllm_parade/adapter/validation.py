# SPDX-License-Identifier: Apache-2.0
"""Checks an adapter against the server, the base model and itself. The caller adds the file name to messages."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_parade.adapter.config import AdapterConfig, AdapterError
from vllm_parade.adapter.weights import (
    BaseModelShape,
    GeneratorWeights,
    adapted_layers,
    generator_shapes,
    shapes_for_sizes,
)

DEFAULT_LAYERS_PATH = "model.layers"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MEANINGS = {
    "down.weight": "[r, hidden size]",
    "pooler.query": "[num_capsules, r]",
    "pooler.weight": "[num_capsules, r, r / num_capsules]",
    "up.weight": "[widths of the sites together, r]",
    "up.bias": "[widths of the sites together]",
}
# The decoder layers' path in the Hugging Face model differs between architectures.
TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.(0|[1-9][0-9]{0,5})\.parade_generator\.(.+)")


def tensor_name(layers_path: str, layer: int, name: str) -> str:
    """Name in the checkpoint of tensor `name` (e.g. down.weight) of a layer's generator."""
    return f"base_model.model.{layers_path}.{layer}.parade_generator.{name}"


def check_config(
    config: AdapterConfig, shape: BaseModelShape | None, max_rank: int | None, sites: Sequence[str] | None
) -> None:
    """Refuse settings that the server or the base model does not support.

    Raises:
        AdapterError: names the key, its value, the limit and the remedy.
    """
    if max_rank is not None and config.r > max_rank:
        raise AdapterError(f"r is {config.r}; expected at most {max_rank}: raise --max-parade-rank to serve it")
    _check_sites(config, shape, sites)
    if shape is None or config.layers_to_transform is None:
        return
    last = shape.num_layers - 1
    if config.layers_to_transform[-1] > last:
        beyond = next(layer for layer in config.layers_to_transform if layer > last)
        raise AdapterError(f"layers_to_transform names layer {beyond}; expected 0 to {last}, the base model's layers")


def _check_sites(config: AdapterConfig, shape: BaseModelShape | None, sites: Sequence[str] | None) -> None:
    for site in config.sites:
        if sites is not None and site not in sites:
            served = ", ".join(sites)
            raise AdapterError(
                f"sites names {site!r}; expected a list out of {served}, which this server serves: "
                f"add {site} to --parade-sites"
            )
        if shape is not None and site not in shape.widths:
            has = ", ".join(shape.widths)
            raise AdapterError(f"sites names {site!r}; expected a list out of {has}, which the base model has")


def check_tensors(
    config: AdapterConfig, tensors: Mapping[str, Tensor], shape: BaseModelShape | None
) -> dict[int, GeneratorWeights]:
    """Validate a checkpoint's tensors and group them into one generator per layer.

    Without `shape`, the hidden size and the sites' total width are taken from the first layer's generator.

    Raises:
        AdapterError: a tensor is missing or superfluous, has a wrong shape or dtype, or holds NaN or infinity.
    """
    layers_path, last_layer = _find_layers(tensors)
    if shape is not None:
        layers = adapted_layers(config, shape)
        sizes = generator_shapes(config, shape)
    else:
        layers = config.layers_to_transform or range(last_layer + 1)
        sizes = _sizes_as_in(config, tensors, layers_path, layers[0])
    generators: dict[int, GeneratorWeights] = {}
    wanted: set[str] = set()
    for layer in layers:
        keys = {name: tensor_name(layers_path, layer, name) for name in sizes}
        for name, key in keys.items():
            _check_tensor(key, tensors.get(key), sizes[name], MEANINGS[name])
        generators[layer] = GeneratorWeights.from_named_tensors({name: tensors[key] for name, key in keys.items()})
        wanted.update(keys.values())
    _refuse_superfluous(tensors, wanted, f"{', '.join(sizes)} in {len(layers)} layers, {layers[0]} to {layers[-1]}")
    return generators


def _find_layers(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    matches = [match for match in map(TENSOR_NAME.fullmatch, sorted(tensors)) if match]
    if not matches:
        example = tensor_name(DEFAULT_LAYERS_PATH, 0, "down.weight")
        raise AdapterError(f"holds no generator; expected tensors named like {example!r}")
    return matches[0][1], max(int(match[2]) for match in matches)


def _sizes_as_in(
    config: AdapterConfig, tensors: Mapping[str, Tensor], layers_path: str, layer: int
) -> dict[str, tuple[int, ...]]:
    """Shapes that follow from this layer's hidden size and total width. No size is zero."""

    def size(name: str, axis: int) -> int:
        tensor = tensors.get(tensor_name(layers_path, layer, name))
        return tensor.shape[axis] if tensor is not None and tensor.ndim and tensor.numel() else 1

    return shapes_for_sizes(config, hidden_size=size("down.weight", -1), d_out=size("up.weight", 0))


def _check_tensor(key: str, tensor: Tensor | None, size: tuple[int, ...], meaning: str) -> None:
    expected = f"expected {list(size)}, {meaning}"
    if tensor is None:
        raise AdapterError(f"tensor {key!r} is missing; {expected}")
    if tuple(tensor.shape) != size:
        raise AdapterError(
            f"tensor {key!r} has shape {list(tensor.shape)}; {expected}: check the config and the base model"
        )
    if tensor.dtype not in DTYPES:
        raise AdapterError(f"tensor {key!r} is {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    # aminmax takes one pass; checking every number takes several. If a tensor holds NaN, its bounds are NaN.
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(f"tensor {key!r} holds NaN or infinity in {bad} places; expected finite numbers")


def _refuse_superfluous(tensors: Mapping[str, Tensor], wanted: set[str], expected: str) -> None:
    superfluous = sorted(set(tensors) - wanted)
    if superfluous:
        raise AdapterError(f"tensor {superfluous[0]!r} is superfluous; expected {expected}")
