# SPDX-License-Identifier: Apache-2.0
"""Adapters of one shape trained side by side: many runs of a study for the price of one.

A small model's training step waits for its kernels' launches, whatever the batch. So runs that differ in seed, learning
rate or data share a step: run g owns the rows [g * rows, (g + 1) * rows) of the batch and the g-th slice of every
parameter. The mathematics is the tuner's (`ops.reference.generate` under `vmap`), and `export` gives PEFT's state dict.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_parade.adapter.weights import TENSOR_ATTRIBUTES, BaseModelShape, GeneratorWeights, initial_generator
from vllm_parade.ops.reference import generate
from vllm_parade.train.data import IGNORED_LABEL
from vllm_parade.train.methods import peft_config
from vllm_parade.tuner.layout import layout_of

EPSILON = 1e-8
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Hyperparameters:
    """What may differ between the runs of a stack."""

    lr: float
    seed: int = 0
    bias_lr: float = 1.0
    """Learning rate of b_up, as a multiple of the others'."""
    initial_std: float = 1.0
    """Of down projection and pooler, as a multiple of the usual."""


class Stack:
    """The adapters of a stack, hooked into a frozen base model of the LLaMA family."""

    def __init__(self, base: Any, method: str, settings: dict[str, Any], runs: Sequence[Hyperparameters]) -> None:
        self.base, self.method, self.runs = base, method, runs
        self.config = peft_config(method, settings)
        self.shape = BaseModelShape.from_hf_config(base.config)
        self.parameters: dict[str, Tensor] = {}
        self.mask: Tensor
        self.vectors: dict[int, Tensor] = {}
        self.shift = 0
        self._handles: list[Any] = []
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        {"parade": self._add_parade, "lora": self._add_lora, "ia3": self._add_ia3}[method]()
        self._moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self._steps = 0

    def remove(self) -> None:
        """Give the base model back."""
        for handle in self._handles:
            handle.remove()

    def export(self, run: int) -> dict[str, Tensor]:
        """One run's adapter under PEFT's names."""
        return {name: parameter[run].detach().clone() for name, parameter in self.parameters.items()}

    def _parameter(self, name: str, values: Sequence[Tensor]) -> None:
        device = next(self.base.parameters()).device
        self.parameters[f"base_model.model.{name}"] = torch.stack(list(values)).to(device).requires_grad_()

    def _get(self, name: str) -> Tensor:
        return self.parameters[f"base_model.model.{name}"]

    # The methods.

    def _add_parade(self) -> None:
        config, layout = self.config.adapter_config(), layout_of(self.base.config)
        randoms = [torch.Generator().manual_seed(run.seed) for run in self.runs]
        for index in range(self.shape.num_layers) if config.layers_to_transform is None else config.layers_to_transform:
            path = f"{layout.layers}.{index}"
            initial = [initial_generator(config, self.shape, random).named_tensors() for random in randoms]
            for name in initial[0]:
                scales = [run.initial_std if not name.startswith("up.") else 1.0 for run in self.runs]
                values = [tensors[name] * scale for tensors, scale in zip(initial, scales, strict=True)]
                self._parameter(f"{path}.parade_generator.{name}", values)
            layer = self.base.get_submodule(path)
            norm = layer.get_submodule(layout.norm)
            self._handles.append(norm.register_forward_hook(partial(self._generate, index, path)))
            for site in config.sites:
                projection = layer.get_submodule(layout.sites[site].projection)
                self._handles.append(projection.register_forward_hook(partial(self._scale, index, site)))

    def _generate(self, index: int, path: str, norm: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        config, runs = self.config.adapter_config(), len(self.runs)
        hidden = args[0] if config.generator_input == "layer_input" else output
        # A later step of an answer keeps the vectors of its prompt.
        if hidden.shape[1] != self.mask.shape[1]:
            return
        prefix = f"base_model.model.{path}.parade_generator."
        names = [name for name in TENSOR_ATTRIBUTES if prefix + name in self.parameters]
        tensors = [self.parameters[prefix + name].to(hidden.dtype) for name in names]

        def one(hidden: Tensor, mask: Tensor, *tensors: Tensor) -> Tensor:
            weights = GeneratorWeights.from_named_tensors(dict(zip(names, tensors, strict=True)))
            return generate(hidden, mask, **vars(weights), pooler=config.pooler, activation=config.activation)

        rows = hidden.unflatten(0, (runs, -1)), self.mask.unflatten(0, (runs, -1))
        vectors = torch.vmap(one)(*rows, *tensors)
        self.vectors[index] = vectors.roll(self.shift, dims=1).flatten(0, 1)

    def _scale(self, index: int, site: str, projection: Any, args: Any, output: Tensor) -> Tensor:
        sites = self.config.sites
        parts = self.vectors[index][:, None].split([self.shape.widths[name] for name in sites], dim=-1)
        return output * parts[sites.index(site)]

    def _add_lora(self) -> None:
        for path, linear in self._targets():
            randoms = [torch.Generator().manual_seed(run.seed) for run in self.runs]
            bound = 1 / math.sqrt(linear.in_features)
            down = [
                torch.empty(self.config.r, linear.in_features).uniform_(-bound, bound, generator=r) for r in randoms
            ]
            self._parameter(f"{path}.lora_A.weight", down)
            self._parameter(f"{path}.lora_B.weight", [torch.zeros(linear.out_features, self.config.r)] * len(self.runs))
            self._handles.append(linear.register_forward_hook(partial(self._lora, path)))

    def _lora(self, path: str, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = (self._get(f"{path}.lora_{half}.weight").to(output.dtype) for half in "AB")
        rows = args[0].unflatten(0, (len(self.runs), -1))
        low = torch.einsum("gbti,gri->gbtr", rows, down)
        added = torch.einsum("gbtr,gor->gbto", low, up).flatten(0, 1)
        return output + added * (self.config.lora_alpha / self.config.r)

    def _add_ia3(self) -> None:
        for path, linear in self._targets():
            self._parameter(f"{path}.ia3_l", [torch.ones(linear.out_features, 1)] * len(self.runs))
            self._handles.append(linear.register_forward_hook(partial(self._ia3, path)))

    def _ia3(self, path: str, linear: Any, args: Any, output: Tensor) -> Tensor:
        vectors = self._get(f"{path}.ia3_l").to(output.dtype).transpose(1, 2)
        return (output.unflatten(0, (len(self.runs), -1)) * vectors[:, None]).flatten(0, 1)

    def _targets(self) -> Iterator[tuple[str, Any]]:
        for path, module in list(self.base.named_modules()):
            if path.rpartition(".")[2] in self.config.target_modules:
                yield path, module

    # Passes.

    def read(self, mask: Tensor, shift: int = 0) -> None:
        """Before a pass: generators read the positions of `mask`, [runs * rows, tokens].

        Args:
            shift: rows of a run by which its vectors move: with 1, every row gets another prompt's
        """
        self.mask, self.shift = mask, shift

    def losses(self, batch: dict[str, Tensor], mask: Tensor, shift: int = 0) -> Tensor:
        """Mean loss of a response token for every run, [runs].

        Args:
            batch: input_ids, attention_mask and labels, [runs * rows, tokens]
        """
        self.read(mask, shift)
        hidden = self.base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        labels = batch["labels"][:, 1:]
        learnt = labels != IGNORED_LABEL
        # Logits of all positions would be most of the memory.
        logits = self.base.lm_head(hidden[:, :-1][learnt]).float()
        each = F.cross_entropy(logits, labels[learnt], reduction="none")
        owner = (torch.arange(len(labels), device=labels.device) // (len(labels) // len(self.runs)))[:, None]
        owner = owner.expand_as(labels)[learnt]
        zeros = each.new_zeros(len(self.runs))
        return zeros.index_add(0, owner, each) / zeros.index_add(0, owner, torch.ones_like(each))

    def step(self, losses: Tensor, share: float) -> None:
        """One step of Adam for every run, its gradients' norm clipped at 1.

        Args:
            share: of the highest learning rate
        """
        names, parameters = zip(*self.parameters.items(), strict=True)
        gradients = torch.autograd.grad(losses.sum(), parameters)
        self._steps += 1
        norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0).sqrt()
        factors = (1 / norms.clamp(min=1e-6)).clamp(max=1)
        corrections = [1 - beta**self._steps for beta in BETAS]
        with torch.no_grad():
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
                mean, square = self._moments[name]
                gradient = gradient * _by_run(factors, gradient)
                mean.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient * gradient, 1 - BETAS[1])
                update = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + EPSILON)
                rates = [run.lr * (run.bias_lr if name.endswith("up.bias") else 1) * share for run in self.runs]
                parameter -= update * _by_run(torch.tensor(rates, device=parameter.device), parameter)


def _by_run(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
