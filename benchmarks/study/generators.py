# SPDX-License-Identifier: Apache-2.0
"""PARADE generators of all runs of a stack. Like the tuner, they use `ops.reference.generate`, here under `vmap`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.methods import Method
from vllm_parade.adapter.weights import TENSOR_ATTRIBUTES, GeneratorWeights, initial_generator
from vllm_parade.ops.reference import generate
from vllm_parade.tuner.layout import layout_of
from vllm_parade.tuner.standard import Observed, Standard


class Generators(Method):
    """One generator per run and adapted layer, and their latest vectors."""

    def add(self) -> None:
        """Make the initial parameters and hook them into the base model."""
        self.vectors: dict[int, tuple[Tensor, ...]] = {}
        """By layer, one tensor [runs * rows, width] per site."""
        self._observed: dict[int, Observed] = {}
        self._standards: dict[str, Standard] = {}
        self.adapter = self.config.adapter_config()
        layout, randoms = layout_of(self.base.config), self._randoms()
        self.layers = self.adapter.layers_to_transform or range(self.shape.num_layers)
        self._paths = {index: f"{layout.layers}.{index}" for index in self.layers}
        for index, path in self._paths.items():
            self._add_parameters(path, randoms)
            layer = self.base.get_submodule(path)
            self._hook(layer.get_submodule(layout.norm), partial(self._generate, index))
            for place, site in enumerate(self.adapter.sites):
                projection = layer.get_submodule(layout.sites[site].projection)
                self._hook(projection, partial(self._scale, index, place))

    def _add_parameters(self, path: str, randoms: list[torch.Generator]) -> None:
        initial = [initial_generator(self.adapter, self.shape, random).named_tensors() for random in randoms]
        for name in initial[0]:
            scales = [run.initial_std if not name.startswith("up.") else 1.0 for run in self.runs]
            values = [tensors[name] * scale for tensors, scale in zip(initial, scales, strict=True)]
            self._parameter(f"{path}.parade_generator.{name}", values)

    def read(self, instruction: Tensor, shift: int) -> None:
        """Set what the next pass reads; see `Stack.read`."""
        self.instruction, self.shift = instruction, shift

    def folded(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Down projections of standardized hidden states, converted to down projections of plain hidden states."""
        return {name: standard.fold(parameters[name]) for name, standard in self._standards.items()}

    def observe(self) -> None:
        """Collect statistics of the hidden states that generators read, in all passes until `standardize`."""
        self._observed = {index: Observed(self.adapter.pooler) for index in self.layers}

    def standardize(self) -> None:
        """Standardize the generators with the collected statistics."""
        self._standards = {
            f"base_model.model.{self._paths[index]}.parade_generator.down.weight": observed.standard()
            for index, observed in self._observed.items()
        }
        self._observed = {}

    def _generate(self, index: int, norm: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        runs = len(self.runs)
        hidden = args[0] if self.adapter.generator_input == "layer_input" else output
        # Decode steps keep the vectors of the prompt.
        if hidden.shape[1] != self.instruction.shape[1]:
            return
        if index in self._observed:
            # All runs have the same rows here, so the first run's are enough.
            self._observed[index].add(hidden.chunk(runs)[0], self.instruction.chunk(runs)[0])
        prefix = f"base_model.model.{self._paths[index]}.parade_generator."
        names = [name for name in TENSOR_ATTRIBUTES if prefix + name in self.weights]
        tensors = [self.weights[prefix + name] for name in names]
        options: dict[str, Any] = {"pooler": self.adapter.pooler, "activation": self.adapter.activation}

        def one(hidden: Tensor, mask: Tensor, *tensors: Tensor) -> Tensor:
            weights = GeneratorWeights.from_named_tensors(dict(zip(names, tensors, strict=True)))
            return generate(hidden, mask, **vars(weights), **options)

        rows = hidden.unflatten(0, (runs, -1)), self.instruction.unflatten(0, (runs, -1))
        vectors = torch.vmap(one)(*rows, *tensors)
        if self.shift:
            vectors = vectors.roll(self.shift, dims=1)
        widths = [self.shape.widths[site] for site in self.adapter.sites]
        self.vectors[index] = vectors.flatten(0, 1).split(widths, dim=-1)

    def _scale(self, index: int, place: int, projection: Any, args: Any, output: Tensor) -> Tensor:
        return output * self.vectors[index][place][:, None]
