# SPDX-License-Identifier: Apache-2.0
"""PARADE over a frozen Hugging Face model: trains adapters, and is the plain answer that serving is compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vllm_parade.adapter.checkpoint import load_adapter, save_adapter
from vllm_parade.adapter.config import AdapterConfig, AdapterError
from vllm_parade.adapter.weights import BaseModelShape, GeneratorWeights, initial_generator
from vllm_parade.ops.reference import generate

# Where a decoder layer of the LLaMA family keeps the projection behind each site.
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
}


class Generator(nn.Module):
    """One layer's generator as trainable float32 parameters, named as the checkpoint names its tensors."""

    def __init__(self, weights: GeneratorWeights) -> None:
        super().__init__()
        self.down = _parameters(weight=weights.down)
        self.pooler = _parameters(query=weights.query, weight=weights.weight)
        self.up = _parameters(weight=weights.up, bias=weights.bias)

    def weights(self) -> GeneratorWeights:
        """The parameters as `ops.reference.generate` takes them; gradients flow through."""
        query, weight = self.pooler.get("query"), self.pooler.get("weight")
        return GeneratorWeights(self.down["weight"], query, weight, self.up["weight"], self.up["bias"])


class ParadeModel(nn.Module):
    """A frozen LLaMA-like `base_model` whose layers are adjusted to each sequence's instruction.

    The base model is hooked, not copied: called by itself it still answers as the base model, and `unload` gives it
    back. Gradient checkpointing is refused, since it would run the hooks again when the vectors are gone.

    Args:
        base_model: a causal language model with `model.layers[i]` of `input_layernorm`, `self_attn` and `mlp`
        config: the adapter's settings
        pooling_dtype: dtype of pooling and activation
        seed: of the initial values; None takes PyTorch's global random state

    Raises:
        AdapterError: the base model lacks a layer or projection that `config` names.
    """

    def __init__(
        self,
        base_model: nn.Module,
        config: AdapterConfig,
        *,
        pooling_dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.base_model, self.config, self.pooling_dtype = base_model, config, pooling_dtype
        self.shape = BaseModelShape.from_hf_config(base_model.config)
        random = None if seed is None else torch.Generator().manual_seed(seed)
        layers = _find_layers(base_model, config, self.shape)
        self.generators = nn.ModuleDict()
        for index, layer in layers.items():
            generator = Generator(initial_generator(config, self.shape, random))
            self.generators[str(index)] = generator.to(next(layer.parameters()).device)
        self._mask: Tensor | None = None
        self._vectors: dict[int, dict[str, Tensor]] = {}
        self._frozen = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._hooks = [hook for index, layer in layers.items() for hook in self._add_hooks(index, layer)]

    @classmethod
    def from_pretrained(cls, base_model: nn.Module, path: str | Path, **kwargs: Any) -> "ParadeModel":
        """Put the adapter saved at `path` over `base_model`.

        Raises:
            AdapterError: names the file, the tensor or value and what was expected.
        """
        adapter = load_adapter(path, BaseModelShape.from_hf_config(base_model.config))
        model = cls(base_model, adapter.config, **kwargs)
        for index, weights in adapter.generators.items():
            generator = model.generators[str(index)]
            generator.load_state_dict(Generator(weights).state_dict())
        return model

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the adapter, its tensors in `dtype`, as a folder that `from_pretrained` and the server read."""
        with torch.no_grad():
            generators = {index: self._weights(index).to("cpu", dtype) for index in map(int, self.generators)}
        save_adapter(path, self.config, generators)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model with vectors generated anew from the instruction.

        Args:
            input_ids: [batch, tokens]
            attention_mask: [batch, tokens], 0 at padding on either side; None means no padding
            instruction_mask: [batch, tokens], 1 at the prompt's tokens; None means every token
            kwargs: the base model's other arguments, e.g. labels
        """
        if self.training and getattr(self.base_model, "is_gradient_checkpointing", False):
            raise ValueError("PARADE does not train with gradient checkpointing; call gradient_checkpointing_disable()")
        with self._instruction(input_ids, attention_mask, instruction_mask):
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's `generate`; vectors come from the prompt's pass and serve every later step.

        Arguments as for `forward`; pad prompts on the left.
        """
        if attention_mask is None:
            # Else Transformers would guess it from padding tokens, and the two masks could differ.
            attention_mask = torch.ones_like(input_ids)
        with self._instruction(input_ids, attention_mask, instruction_mask):
            return cast(Any, self.base_model).generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def unload(self) -> nn.Module:
        """Take the adapter off and return the base model as it was given."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        return self.base_model

    def _weights(self, index: int) -> GeneratorWeights:
        return cast(Generator, self.generators[str(index)]).weights()

    @contextmanager
    def _instruction(self, input_ids: Tensor, *masks: Tensor | None) -> Iterator[None]:
        """Hold one call's instruction mask and vectors; afterwards, come what may, both are gone."""
        instruction = torch.ones_like(input_ids, dtype=torch.bool)
        for mask in masks:
            if mask is None:
                continue
            if mask.shape != input_ids.shape:
                raise ValueError(f"mask has shape {tuple(mask.shape)}; expected input_ids', {tuple(input_ids.shape)}")
            instruction = instruction & mask.bool()
        if not instruction.any(dim=1).all():
            raise ValueError("a row has no instruction token; every row needs at least one")
        self._mask, self._vectors = instruction, {}
        try:
            yield
        finally:
            self._mask, self._vectors = None, {}

    def _add_hooks(self, index: int, layer: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield layer.get_submodule("input_layernorm").register_forward_hook(partial(self._read_instruction, index))
        for site in self.config.sites:
            projection = layer.get_submodule(PROJECTIONS[site])
            yield projection.register_forward_hook(partial(self._adjust, index, site))

    def _read_instruction(self, index: int, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Generate the layer's vectors in the first pass; the norm sees the layer's input and makes the attention's."""
        if self._mask is None or index in self._vectors:
            return
        hidden = args[0] if self.config.generator_input == "layer_input" else output
        if hidden.shape[1] != self._mask.shape[1]:
            raise ValueError(f"a pass of {hidden.shape[1]} tokens; the whole prompt of {self._mask.shape[1]} is needed")
        # Beam search and several sequences a prompt repeat each row.
        mask = self._mask.to(hidden.device).repeat_interleave(len(hidden) // len(self._mask), dim=0)
        # Rounded as the server rounds them: what is trained is what is served.
        weights = self._weights(index).to(hidden.device, hidden.dtype)
        vectors = generate(
            hidden,
            mask,
            **vars(weights),
            pooler=self.config.pooler,
            activation=self.config.activation,
            pooling_dtype=self.pooling_dtype,
        )
        widths = [self.shape.widths[site] for site in self.config.sites]
        self._vectors[index] = dict(zip(self.config.sites, vectors[:, None].split(widths, dim=-1), strict=True))

    def _adjust(self, index: int, site: str, projection: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Scale [batch, tokens, width] by the sequence's vector; outside of a PARADE call, leave it."""
        return output if self._mask is None else output * self._vectors[index][site]


def _parameters(**tensors: Tensor | None) -> nn.ParameterDict:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return nn.ParameterDict({name: nn.Parameter(tensor.float()) for name, tensor in given.items()})


def _find_layers(base_model: nn.Module, config: AdapterConfig, shape: BaseModelShape) -> dict[int, nn.Module]:
    """The decoder layers that carry a generator, after a look at every module that will be hooked."""
    layers = {}
    needed = ("input_layernorm", *(PROJECTIONS[site] for site in config.sites))
    for index in range(shape.num_layers) if config.layers_to_transform is None else config.layers_to_transform:
        path = f"model.layers.{index}"
        for module in (path, *(f"{path}.{name}" for name in needed)):
            try:
                base_model.get_submodule(module)
            except AttributeError as error:
                message = (
                    f"base model {type(base_model).__name__} has no {module}; expected LlamaForCausalLM's structure"
                )
                raise AdapterError(message) from error
        layers[index] = base_model.get_submodule(path)
    return layers
