# SPDX-License-Identifier: Apache-2.0
"""A decoder layer's generators, one per adapter, as a PEFT tuner layer. Names are those of the checkpoint."""

from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vllm_parade.adapter.weights import GeneratorWeights
from vllm_parade.tuner.instruction import BatchTurns
from vllm_parade.tuner.standard import DownProjection, Observed, Standard


class Pooler(nn.Module):
    """The pooler's parameters, by adapter: v_k [k, r] and W_k [k, r, r / k]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.weight = nn.ParameterDict(), nn.ParameterDict()


class ParadeGenerator(nn.Module, BaseTunerLayer):
    """The generators of one decoder layer, as a child module of that layer."""

    adapter_layer_names = ("down", "query", "matrix", "up")
    # Defined by PEFT, without types.
    set_adapter: Any
    delete_adapter: Any

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        # Turns of the forward pass that currently runs this layer.
        self.turns: BatchTurns | None = None
        # Set while `ParadeModel.standardize` collects hidden states.
        self.observed: Observed | None = None
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        self.pooler = Pooler()

    @property
    def query(self) -> nn.ParameterDict:
        """The pooler's v_k, as an attribute that PEFT can find."""
        return self.pooler.query

    @property
    def matrix(self) -> nn.ParameterDict:
        """The pooler's W_k, as an attribute that PEFT can find. PEFT uses `weight` for the base layer's weight."""
        return self.pooler.weight

    def add(self, adapter_name: str, weights: GeneratorWeights) -> None:
        """Add an adapter's generator as trainable parameters."""
        self.down[adapter_name] = DownProjection(weights.down)
        up = nn.Linear(weights.up.shape[1], weights.up.shape[0], device="meta")
        up.weight, up.bias = nn.Parameter(weights.up), nn.Parameter(weights.bias)
        self.up[adapter_name] = up
        for part, tensor in ((self.query, weights.query), (self.matrix, weights.weight)):
            if tensor is not None:
                part[adapter_name] = nn.Parameter(tensor)

    def weights(self, adapter_name: str) -> GeneratorWeights:
        """An adapter's generator for `ops.reference.generate`. Gradients flow through."""
        down, up = cast(DownProjection, self.down[adapter_name]), cast(nn.Linear, self.up[adapter_name])
        query, weight = (cast(Any, part).get(adapter_name) for part in (self.query, self.matrix))
        return GeneratorWeights(down.plain, query, weight, up.weight, up.bias)

    def standardize(self, adapter_name: str, standard: Standard, wide: float) -> None:
        """Make an untrained adapter read standardized hidden states. Scales down projection and pooler by `wide`."""
        down = cast(DownProjection, self.down[adapter_name])
        down.standard = standard
        for tensor in (down.weight, *(cast(Any, part).get(adapter_name) for part in (self.query, self.matrix))):
            if tensor is not None:
                tensor.mul_(wide)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises, because vectors differ from prompt to prompt."""
        raise ValueError(
            "PARADE adapters cannot be merged: their vectors differ from prompt to prompt, so no weights equal them; "
            "serve the adapter beside its base model"
        )

    def unmerge(self) -> None:
        """Does nothing, because adapters are never merged."""
