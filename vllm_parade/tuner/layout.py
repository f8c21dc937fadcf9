# SPDX-License-Identifier: Apache-2.0
"""Paths of the decoder layers, their first norms and the sites' projections in each supported base model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vllm_parade.adapter.config import AdapterError

# Scales a part of a projection's output [batch, tokens, ...] by a vector [batch, 1, width].
Scale = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """The projection of a site. Several sites may share one projection."""

    projection: str
    """Path within the decoder layer."""
    scale: Scale = torch.mul


@dataclass(frozen=True)
class Layout:
    """Paths of one architecture."""

    layers: str
    """List of decoder layers, within the causal language model. Its parent is the backbone."""
    norm: str
    """A decoder layer's first norm, from the layer's input to the attention's input."""
    sites: dict[str, Site]

    @property
    def backbone(self) -> str:
        """Path of the model without its head."""
        return self.layers.rpartition(".")[0]

    def check(self, model: nn.Module, layers: Sequence[int], sites: tuple[str, ...]) -> None:
        """Refuse a model that lacks a module to hook.

        Raises:
            AdapterError: names the module.
        """
        for layer in (f"{self.layers}.{index}" for index in layers):
            for path in (layer, f"{layer}.{self.norm}", *(f"{layer}.{self.sites[s].projection}" for s in sites)):
                try:
                    model.get_submodule(path)
                except AttributeError as error:
                    raise AdapterError(f"base model {type(model).__name__} has no {path}") from error


def layout_of(config: Any) -> Layout:
    """The layout of a Hugging Face model, by its config.

    Raises:
        AdapterError: the architecture is not supported.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in _LAYOUTS:
        raise AdapterError(f"base model is a {model_type!r}; expected one of {', '.join(_LAYOUTS)}")
    return _LAYOUTS[model_type](config)


def _llama(config: Any) -> Layout:
    attention = {site: Site(f"self_attn.{site}_proj") for site in "qkv"}
    mlp = {site: Site(f"mlp.{site}_proj") for site in ("gate", "up")}
    return Layout("model.layers", "input_layernorm", attention | mlp)


def _gpt2(config: Any) -> Layout:
    sites = {site: Site("attn.c_attn", partial(_third, number)) for number, site in enumerate("qkv")}
    return Layout("transformer.h", "ln_1", {**sites, "up": Site("mlp.c_fc")})


def _gpt_neox(config: Any) -> Layout:
    thirds = (partial(_third_of_heads, number, config.num_attention_heads) for number in range(3))
    sites = {site: Site("attention.query_key_value", third) for site, third in zip("qkv", thirds, strict=True)}
    return Layout("gpt_neox.layers", "input_layernorm", {**sites, "up": Site("mlp.dense_h_to_4h")})


def _third(number: int, output: Tensor, vector: Tensor) -> Tensor:
    """Scale one part of an output [q | k | v]."""
    parts = list(output.chunk(3, dim=-1))
    parts[number] = parts[number] * vector
    return torch.cat(parts, dim=-1)


def _third_of_heads(number: int, heads: int, output: Tensor, vector: Tensor) -> Tensor:
    """Scale one part of an output that is [q | k | v] of the first head, then of the second, and so on."""
    parts = list(output.unflatten(-1, (heads, 3, -1)).unbind(dim=-2))
    parts[number] = parts[number] * vector.unflatten(-1, (heads, -1))
    return torch.stack(parts, dim=-2).flatten(-3)


_LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
