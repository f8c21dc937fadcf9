# SPDX-License-Identifier: Apache-2.0
"""Trains adapters of one shape side by side: many runs of a study in the time of one.

A small model's training step is launch-bound at any batch size. So runs that differ in seed, learning rate or data
share a step. Run g owns the rows [g * rows, (g + 1) * rows) of the batch and the g-th row of `flat`. `flat` holds all
parameters of all layers, so that Adam takes only a few kernels. `export` returns PEFT's state dict.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.batch import Batch
from benchmarks.study.generators import Generators
from benchmarks.study.group import Hyperparameters
from benchmarks.study.methods import IA3, LoRA, Method
from vllm_parade.train.data import IGNORED_LABEL
from vllm_parade.train.methods import peft_config

EPSILON = 1e-8
BETAS = (0.9, 0.999)
METHODS: dict[str, type[Method]] = {"parade": Generators, "lora": LoRA, "ia3": IA3}


def fuse_norms(base: Any) -> None:
    """Replace every RMS norm of a base model by PyTorch's fused one: one kernel instead of eight."""
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            options = {"weight": module.weight, "eps": module.variance_epsilon}
            module.forward = partial(F.rms_norm, normalized_shape=list(module.weight.shape), **options)


class Stack:
    """The adapters of a stack, hooked into a frozen base model of the LLaMA family."""

    def __init__(self, base: Any, method: str, settings: dict[str, Any], runs: Sequence[Hyperparameters]) -> None:
        self.base, self.runs = base, runs
        self.device = next(base.parameters()).device
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.method = METHODS[method](base, peft_config(method, settings), runs)
        initial = self.method.initial
        self._shapes = {name: values.shape for name, values in initial.items()}
        self.sizes = [shape[1:].numel() for shape in self._shapes.values()]
        self.flat = torch.cat([values.flatten(1) for values in initial.values()], dim=1).to(self.device)
        self.flat.requires_grad_()
        rates = [self._rate(name).expand(-1, size) for name, size in zip(initial, self.sizes, strict=True)]
        self._rates = torch.cat(rates, dim=1).to(self.device)
        self._moments = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self._steps = torch.zeros((), device=self.device)
        initial.clear()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All runs' parameters under PEFT's names, [runs, ...], as views of `flat`."""
        return self._split(self.flat.detach())

    def reset_optimizer(self) -> None:
        """Reset Adam's moments and step count."""
        for tensor in (*self._moments, self._steps):
            tensor.zero_()

    def remove(self) -> None:
        """Remove all hooks from the base model."""
        self.method.remove()

    def export(self, run: int) -> dict[str, Tensor]:
        """One run's adapter under PEFT's names."""
        parameters = self.parameters
        parameters |= self.method.folded(parameters)
        return {name: parameter[run].clone() for name, parameter in parameters.items()}

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes.items(), flat.split(self.sizes, dim=1), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def _rate(self, name: str) -> Tensor:
        return torch.tensor([[run.lr * (run.bias_lr if name.endswith("up.bias") else 1)] for run in self.runs])

    @torch.no_grad()
    def standardize(self, batch: Batch) -> None:
        """Like `ParadeModel.standardize`, with a batch that has the same rows for every run."""
        assert isinstance(self.method, Generators)
        self.method.observe()
        self.hidden(batch)
        self.method.standardize()

    def read(self, instruction: Tensor, shift: int = 0) -> None:
        """Prepare a pass: set the weights and the positions that generators read.

        Args:
            instruction: positions to read, [runs * rows, tokens] bool
            shift: number of rows by which vectors are rolled within a run; with 1, each row gets another prompt's
        """
        self.method.read(instruction, shift)
        folded = self.method.folded(self._split(self.flat))
        self.method.weights = self._split(self.flat.to(self.base.dtype))
        self.method.weights |= {name: weight.to(self.base.dtype) for name, weight in folded.items()}

    def hidden(self, batch: Batch, shift: int = 0) -> Tensor:
        """Last hidden states at the batch's `places`, [runs, learnt, hidden]."""
        self.read(batch.instruction, shift)
        # The model's own forward pass reads tensor values on the host to make a mask, which CUDA graphs do not allow.
        model = self.base.model
        hidden = model.embed_tokens(batch.ids)
        positions = torch.arange(batch.ids.shape[1], device=self.device)[None]
        rotation = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotation)
        chosen = hidden.flatten(0, 1).index_select(0, batch.places.flatten())
        return model.norm(chosen).unflatten(0, batch.places.shape)

    def losses(self, batch: Batch, shift: int = 0) -> Tensor:
        """Mean loss per response token of each run, [runs]."""
        logits = self.base.lm_head(self.hidden(batch, shift)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return losses.view_as(batch.targets).sum(dim=1) / (batch.targets != IGNORED_LABEL).sum(dim=1)

    def step(self, losses: Tensor, share: Tensor) -> None:
        """One step of Adam for every run, with the norm of each run's gradient clipped at 1.

        Args:
            share: learning rate as a share of the highest one, a scalar
        """
        (gradient,) = torch.autograd.grad(losses.sum(), self.flat)
        mean, square = self._moments
        with torch.no_grad():
            self._steps += 1
            gradient *= (1 / gradient.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient * gradient, 1 - BETAS[1])
            corrections = [1 - beta**self._steps for beta in BETAS]
            update = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + EPSILON)
            self.flat -= self._rates * share * update
