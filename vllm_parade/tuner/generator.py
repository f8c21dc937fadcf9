# SPDX-License-Identifier: Apache-2.0
"""A decoder layer's generators, one for each adapter, as PEFT's tuner layers; named as the checkpoint names tensors."""

from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vllm_parade.adapter.weights import GeneratorWeights
from vllm_parade.tuner.instruction import Instruction


class Pooler(nn.Module):
    """The pooler's parameters, by adapter: v_k [k, r] and W_k [k, r, r / k]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.weight = nn.ParameterDict(), nn.ParameterDict()


class ParadeGenerator(nn.Module, BaseTunerLayer):
    """The generators of one decoder layer, whose child it is."""

    adapter_layer_names = ("down", "query", "matrix", "up")
    # PEFT's, of which the type checker sees nothing.
    set_adapter: Any
    delete_adapter: Any

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        # Of the pass that is in this layer now.
        self.instruction: Instruction | None = None
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        self.pooler = Pooler()

    @property
    def query(self) -> nn.ParameterDict:
        """The pooler's v_k, where PEFT looks for them."""
        return self.pooler.query

    @property
    def matrix(self) -> nn.ParameterDict:
        """The pooler's W_k, where PEFT looks for them; it takes `weight` for the base layer's."""
        return self.pooler.weight

    def add(self, adapter_name: str, weights: GeneratorWeights) -> None:
        """Take an adapter's generator as trainable parameters."""
        self.down[adapter_name] = _linear(weights.down)
        self.up[adapter_name] = _linear(weights.up, weights.bias)
        for part, tensor in ((self.query, weights.query), (self.matrix, weights.weight)):
            if tensor is not None:
                part[adapter_name] = nn.Parameter(tensor)

    def weights(self, adapter_name: str) -> GeneratorWeights:
        """An adapter's generator as `ops.reference.generate` takes it; gradients flow through."""
        down, up = (cast(nn.Linear, part[adapter_name]) for part in (self.down, self.up))
        query, weight = (cast(Any, part).get(adapter_name) for part in (self.query, self.matrix))
        return GeneratorWeights(down.weight, query, weight, up.weight, up.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: vectors are another for every prompt."""
        raise ValueError(
            "PARADE adapters cannot be merged: their vectors differ from prompt to prompt, so no weights equal them; "
            "serve the adapter beside its base model"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear
