# SPDX-License-Identifier: Apache-2.0
"""Adapters of one shape trained side by side: many runs of a study for the price of one.

A small model's training step waits for its kernels' launches, whatever the batch. So runs that differ in seed, learning
rate or data share a step: run g owns the rows [g * rows, (g + 1) * rows) of the batch and the g-th row of `flat`, which
holds every parameter of every layer, so that Adam is a few kernels. The mathematics is the tuner's
(`ops.reference.generate` under `vmap`), and `export` gives PEFT's state dict.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.batch import Batch
from vllm_parade.adapter.weights import TENSOR_ATTRIBUTES, BaseModelShape, GeneratorWeights, initial_generator
from vllm_parade.ops.reference import generate
from vllm_parade.train.data import IGNORED_LABEL
from vllm_parade.train.methods import peft_config
from vllm_parade.tuner.layout import layout_of
from vllm_parade.tuner.standard import Observed, Standard

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


def fuse_norms(base: Any) -> None:
    """Give every RMS norm of a base model PyTorch's own kernel, one instead of eight."""
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            options = {"weight": module.weight, "eps": module.variance_epsilon}
            module.forward = partial(F.rms_norm, normalized_shape=list(module.weight.shape), **options)


class Stack:
    """The adapters of a stack, hooked into a frozen base model of the LLaMA family."""

    def __init__(self, base: Any, method: str, settings: dict[str, Any], runs: Sequence[Hyperparameters]) -> None:
        self.base, self.method, self.runs = base, method, runs
        self.config = peft_config(method, settings)
        self.shape = BaseModelShape.from_hf_config(base.config)
        self.device = next(base.parameters()).device
        self.vectors: dict[int, tuple[Tensor, ...]] = {}
        self._seen: dict[int, Observed] = {}
        self._standards: dict[str, Standard] = {}
        self._initial: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        {"parade": self._add_parade, "lora": self._add_lora, "ia3": self._add_ia3}[method]()
        shapes = {name: values.shape for name, values in self._initial.items()}
        self._shapes, self.sizes = shapes, [shape[1:].numel() for shape in shapes.values()]
        self.flat = torch.cat([values.flatten(1) for values in self._initial.values()], dim=1).to(self.device)
        self.flat.requires_grad_()
        self._initial.clear()
        self._rates = torch.cat(
            [self._rate(name).expand(-1, size) for name, size in zip(shapes, self.sizes, strict=True)], dim=1
        ).to(self.device)
        self._moments = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self._steps = torch.zeros((), device=self.device)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All runs' parameters under PEFT's names, [runs, ...]: parts of `flat`."""
        return self._split(self.flat.detach())

    def forget(self) -> None:
        """Begin Adam anew."""
        for tensor in (*self._moments, self._steps):
            tensor.zero_()

    def remove(self) -> None:
        """Give the base model back."""
        for handle in self._handles:
            handle.remove()

    def export(self, run: int) -> dict[str, Tensor]:
        """One run's adapter under PEFT's names."""
        parameters = self.parameters
        parameters |= {name: standard.fold(parameters[name]) for name, standard in self._standards.items()}
        return {name: parameter[run].clone() for name, parameter in parameters.items()}

    def _parameter(self, name: str, values: Sequence[Tensor]) -> None:
        self._initial[f"base_model.model.{name}"] = torch.stack(list(values))

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes.items(), flat.split(self.sizes, dim=1), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def _rate(self, name: str) -> Tensor:
        return torch.tensor([[run.lr * (run.bias_lr if name.endswith("up.bias") else 1)] for run in self.runs])

    def _get(self, name: str) -> Tensor:
        return self._weights[f"base_model.model.{name}"]

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
            for place, site in enumerate(config.sites):
                projection = layer.get_submodule(layout.sites[site].projection)
                self._handles.append(projection.register_forward_hook(partial(self._scale, index, place)))

    def _generate(self, index: int, path: str, norm: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        config, runs = self.config.adapter_config(), len(self.runs)
        hidden = args[0] if config.generator_input == "layer_input" else output
        # A later step of an answer keeps the vectors of its prompt.
        if hidden.shape[1] != self.instruction.shape[1]:
            return
        if index in self._seen:
            # The same rows for every run.
            self._seen[index].add(hidden.chunk(runs)[0], self.instruction.chunk(runs)[0])
        prefix = f"base_model.model.{path}.parade_generator."
        names = [name for name in TENSOR_ATTRIBUTES if prefix + name in self._weights]
        tensors = [self._weights[prefix + name] for name in names]

        def one(hidden: Tensor, mask: Tensor, *tensors: Tensor) -> Tensor:
            weights = GeneratorWeights.from_named_tensors(dict(zip(names, tensors, strict=True)))
            return generate(hidden, mask, **vars(weights), pooler=config.pooler, activation=config.activation)

        rows = hidden.unflatten(0, (runs, -1)), self.instruction.unflatten(0, (runs, -1))
        vectors = torch.vmap(one)(*rows, *tensors)
        if self.shift:
            vectors = vectors.roll(self.shift, dims=1)
        self.vectors[index] = vectors.flatten(0, 1).split([self.shape.widths[name] for name in config.sites], dim=-1)

    @torch.no_grad()
    def standardize(self, batch: Batch) -> None:
        """As `ParadeModel.standardize`, by a batch with the same rows for every run."""
        prefix, suffix = f"base_model.model.{layout_of(self.base.config).layers}.", ".parade_generator.down.weight"
        names = [name for name in self._shapes if name.endswith(suffix)]
        pooler = self.config.adapter_config().pooler
        self._seen = {int(name.removeprefix(prefix).removesuffix(suffix)): Observed(pooler) for name in names}
        self.hidden(batch)
        self._standards = {name: seen.standard() for name, seen in zip(names, self._seen.values(), strict=True)}
        self._seen = {}

    def _scale(self, index: int, place: int, projection: Any, args: Any, output: Tensor) -> Tensor:
        return output * self.vectors[index][place][:, None]

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
        down, up = (self._get(f"{path}.lora_{half}.weight").mT for half in "AB")
        low = args[0].unflatten(0, (len(self.runs), -1)).flatten(1, 2) @ down
        grouped = output.unflatten(0, (len(self.runs), -1)).flatten(1, 2)
        return torch.baddbmm(grouped, low, up, alpha=self.config.lora_alpha / self.config.r).view_as(output)

    def _add_ia3(self) -> None:
        for path, linear in self._targets():
            self._parameter(f"{path}.ia3_l", [torch.ones(linear.out_features, 1)] * len(self.runs))
            self._handles.append(linear.register_forward_hook(partial(self._ia3, path)))

    def _ia3(self, path: str, linear: Any, args: Any, output: Tensor) -> Tensor:
        vectors = self._get(f"{path}.ia3_l").mT
        return (output.unflatten(0, (len(self.runs), -1)) * vectors[:, None]).flatten(0, 1)

    def _targets(self) -> Iterator[tuple[str, Any]]:
        for path, module in list(self.base.named_modules()):
            if path.rpartition(".")[2] in self.config.target_modules:
                yield path, module

    # Passes.

    def read(self, instruction: Tensor, shift: int = 0) -> None:
        """Before a pass: generators read these positions, [runs * rows, tokens] bool.

        Args:
            shift: rows of a run by which its vectors move: with 1, every row gets another prompt's
        """
        self.instruction, self.shift = instruction, shift
        self._weights = self._split(self.flat.to(self.base.dtype))
        trained = self._split(self.flat) if self._standards else {}
        for name, standard in self._standards.items():
            self._weights[name] = standard.fold(trained[name]).to(self.base.dtype)

    def hidden(self, batch: Batch, shift: int = 0) -> Tensor:
        """Last hidden states at the batch's places, [runs, learnt, hidden]."""
        self.read(batch.instruction, shift)
        # The model's own forward pass looks at its tensors' values on the way to a mask, which a graph may not.
        model = self.base.model
        hidden = model.embed_tokens(batch.ids)
        positions = torch.arange(batch.ids.shape[1], device=self.device)[None]
        rotation = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotation)
        chosen = hidden.flatten(0, 1).index_select(0, batch.places.flatten())
        return model.norm(chosen).unflatten(0, batch.places.shape)

    def losses(self, batch: Batch, shift: int = 0) -> Tensor:
        """Mean loss of a response token for every run, [runs]."""
        logits = self.base.lm_head(self.hidden(batch, shift)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return losses.view_as(batch.targets).sum(dim=1) / (batch.targets != IGNORED_LABEL).sum(dim=1)

    def step(self, losses: Tensor, share: Tensor) -> None:
        """One step of Adam for every run, its gradients' norm clipped at 1.

        Args:
            share: of the highest learning rate, a scalar
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


class Steps:
    """Training steps on batches of a few sizes; with CUDA a graph of each size, so that nothing waits for launches."""

    def __init__(self, stack: Stack, examples: Sequence[Batch]) -> None:
        """
        Args:
            examples: a batch of every size
        """
        self.stack, self._pool = stack, None
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        if stack.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            # The largest first: its memory then serves the others.
            for batch in sorted(examples, key=lambda batch: -batch.ids.numel()):
                self._graphs[batch.ids.shape] = self._capture(batch.to(stack.device))
            stack.forget()

    def __call__(self, batch: Batch, share: float) -> None:
        """
        Args:
            share: of the highest learning rate
        """
        if self._pool is None:
            self._step(batch, torch.tensor(share))
            return
        graph, inputs, inputs_share = self._graphs[batch.ids.shape]
        for static, tensor in zip(inputs, batch, strict=True):
            static.copy_(tensor)
        inputs_share.fill_(share)
        graph.replay()

    def _step(self, batch: Batch, share: Tensor) -> None:
        self.stack.step(self.stack.losses(batch), share)

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        # With nothing of the learning rate, the warm-up leaves the parameters as they are.
        share = torch.zeros((), device=self.stack.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(batch, share)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(batch, share)
        return graph, batch, share
