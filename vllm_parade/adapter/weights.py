# SPDX-License-Identifier: Apache-2.0
"""The tensors of one generator, and their shapes for a base model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_parade.adapter.config import AdapterConfig

# Standard deviation of the initial down projection and pooler.
INITIAL_STD = 0.02
# Field of GeneratorWeights for each tensor name in the checkpoint.
TENSOR_ATTRIBUTES = {
    "down.weight": "down",
    "pooler.query": "query",
    "pooler.weight": "weight",
    "up.weight": "up",
    "up.bias": "bias",
}


@dataclass(frozen=True)
class BaseModelShape:
    """Sizes of the base model that determine an adapter's shapes, before any tensor parallelism."""

    hidden_size: int
    num_layers: int
    widths: dict[str, int]
    """Output size of each site's projection (q, k, v, gate, up)."""

    @classmethod
    def from_hf_config(cls, config: Any) -> "BaseModelShape":
        """Read the sizes from the Hugging Face config of a LLaMA-like model, GPT-2 or GPT-NeoX."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        widths = {"q": heads * head_dim, "k": kv_width, "v": kv_width}
        model_type = getattr(config, "model_type", None)
        if model_type == "gpt2":
            widths["up"] = config.n_inner or 4 * config.hidden_size
        elif model_type == "gpt_neox":
            widths["up"] = config.intermediate_size
        else:
            widths |= {"gate": config.intermediate_size, "up": config.intermediate_size}
        return cls(config.hidden_size, config.num_hidden_layers, widths)

    def output_width(self, sites: tuple[str, ...]) -> int:
        """d_out: total width of the vectors of `sites`."""
        return sum(self.widths[site] for site in sites)


@dataclass(frozen=True, eq=False)
class GeneratorWeights:
    """One layer's generator. The fields are arguments of `ops.reference.generate`.

    Shapes: down [r, d], query [k, r], weight [k, r, r / k], up [d_out, r], bias [d_out].
    """

    down: Tensor
    query: Tensor | None
    weight: Tensor | None
    up: Tensor
    bias: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "GeneratorWeights":
        """The same weights on `device` in `dtype`."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.named_tensors().items()}
        return GeneratorWeights.from_named_tensors(moved)

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors by checkpoint name, without absent ones."""
        tensors = {name: getattr(self, attribute) for name, attribute in TENSOR_ATTRIBUTES.items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def from_named_tensors(cls, tensors: Mapping[str, Tensor]) -> "GeneratorWeights":
        """Inverse of `named_tensors`."""
        values: dict[str, Any] = {attribute: tensors.get(name) for name, attribute in TENSOR_ATTRIBUTES.items()}
        return cls(**values)


def generator_shapes(config: AdapterConfig, shape: BaseModelShape) -> dict[str, tuple[int, ...]]:
    """Checkpoint name and stored shape of every tensor of one layer's generator."""
    return shapes_for_sizes(config, shape.hidden_size, shape.output_width(config.sites))


def shapes_for_sizes(config: AdapterConfig, hidden_size: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Like `generator_shapes`, from the base model's hidden size and the output width alone."""
    r, k = config.r, config.num_capsules
    shapes: dict[str, tuple[int, ...]] = {"down.weight": (r, hidden_size)}
    if config.pooler == "attentional_capsule":
        shapes["pooler.query"] = (k, r)
    if config.pooler != "last_token":
        shapes["pooler.weight"] = (k, r, r // k)
    return {**shapes, "up.weight": (d_out, r), "up.bias": (d_out,)}


def adapted_layers(config: AdapterConfig, shape: BaseModelShape) -> Sequence[int]:
    """Numbers of the layers that have a generator, ascending."""
    return range(shape.num_layers) if config.layers_to_transform is None else config.layers_to_transform


def parameter_count(config: AdapterConfig, shape: BaseModelShape, *, bias: bool = True) -> int:
    """Number of parameters of an adapter. With `bias=False`, b_up is not counted, as in the paper."""
    shapes = generator_shapes(config, shape)
    counted = [size for name, size in shapes.items() if bias or name != "up.bias"]
    return len(adapted_layers(config, shape)) * sum(math.prod(size) for size in counted)


def initial_generator(
    config: AdapterConfig, shape: BaseModelShape, generator: torch.Generator | None = None
) -> GeneratorWeights:
    """Create a generator for the start of training. It writes vectors of exactly one.

    Down projection and pooler are uniform with mean 0 and standard deviation 0.02. The up projection is zero and its
    bias one. All tensors are float32.

    Args:
        generator: random number generator, whose device the tensors get; None uses PyTorch's default on the CPU
    """
    device = torch.device("cpu") if generator is None else generator.device
    bound = INITIAL_STD * math.sqrt(3)
    tensors: dict[str, Tensor] = {}
    for name, size in generator_shapes(config, shape).items():
        tensor = torch.empty(size, dtype=torch.float32, device=device)
        if name.startswith("up."):
            tensors[name] = tensor.fill_(float(name == "up.bias"))
        else:
            tensors[name] = tensor.uniform_(-bound, bound, generator=generator)
    return GeneratorWeights.from_named_tensors(tensors)
