# SPDX-License-Identifier: Apache-2.0
"""LoRA and (IA)3 of all runs of a stack, as hooks on a LLaMA-like base model. PARADE is in generators.py."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.group import Hyperparameters
from vllm_parade.adapter import BaseModelShape


class Method:
    """The adapters of all runs, as tensors [runs, ...]. Run g owns the g-th part of a batch's rows."""

    def __init__(self, base: Any, config: Any, runs: Sequence[Hyperparameters]) -> None:
        self.base, self.config, self.runs = base, config, runs
        self.shape = BaseModelShape.from_hf_config(base.config)
        self.initial: dict[str, Tensor] = {}
        """Parameters before training, under PEFT's names."""
        self.weights: dict[str, Tensor] = {}
        """Parameters of the current pass, in the base model's dtype; set before each pass."""
        self._handles: list[Any] = []
        self.add()

    def add(self) -> None:
        """Make the initial parameters and hook them into the base model."""
        raise NotImplementedError

    def read(self, instruction: Tensor, shift: int) -> None:
        """Set what the next pass reads; see `Stack.read`."""

    def folded(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that are trained in another form, converted to the form used in passes and in saved adapters."""
        return {}

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: Any, hook: Any) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _parameter(self, name: str, values: Sequence[Tensor]) -> None:
        self.initial[f"base_model.model.{name}"] = torch.stack(list(values))

    def _get(self, name: str) -> Tensor:
        return self.weights[f"base_model.model.{name}"]

    def _randoms(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(run.seed) for run in self.runs]

    def _targets(self) -> Iterator[tuple[str, Any]]:
        for path, module in list(self.base.named_modules()):
            if path.rpartition(".")[2] in self.config.target_modules:
                yield path, module


class LoRA(Method):
    """PEFT's LoRA without dropout."""

    def add(self) -> None:
        """Make the initial parameters and hook them into the base model."""
        r = self.config.r
        for path, linear in self._targets():
            bound = 1 / math.sqrt(linear.in_features)
            empty = (torch.empty(r, linear.in_features) for _ in self.runs)
            down = [one.uniform_(-bound, bound, generator=g) for one, g in zip(empty, self._randoms(), strict=True)]
            self._parameter(f"{path}.lora_A.weight", down)
            self._parameter(f"{path}.lora_B.weight", [torch.zeros(linear.out_features, r)] * len(self.runs))
            self._hook(linear, partial(self._add_product, path))

    def _add_product(self, path: str, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = (self._get(f"{path}.lora_{half}.weight").mT for half in "AB")
        low = args[0].unflatten(0, (len(self.runs), -1)).flatten(1, 2) @ down
        grouped = output.unflatten(0, (len(self.runs), -1)).flatten(1, 2)
        return torch.baddbmm(grouped, low, up, alpha=self.config.lora_alpha / self.config.r).view_as(output)


class IA3(Method):
    """PEFT's (IA)3, applied to outputs."""

    def add(self) -> None:
        """Make the initial parameters and hook them into the base model."""
        for path, linear in self._targets():
            self._parameter(f"{path}.ia3_l", [torch.ones(linear.out_features, 1)] * len(self.runs))
            self._hook(linear, partial(self._scale, path))

    def _scale(self, path: str, linear: Any, args: Any, output: Tensor) -> Tensor:
        vectors = self._get(f"{path}.ia3_l").mT
        return (output.unflatten(0, (len(self.runs), -1)) * vectors[:, None]).flatten(0, 1)
