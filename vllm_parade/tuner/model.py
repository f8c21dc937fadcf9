# SPDX-License-Identifier: Apache-2.0
"""PARADE as a PEFT tuner for a frozen Hugging Face model: for training, and as the reference for served answers."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from vllm_parade.adapter.turns import TurnMarkers
from vllm_parade.adapter.validation import check_config, check_tensors
from vllm_parade.adapter.weights import BaseModelShape, adapted_layers, initial_generator
from vllm_parade.ops.reference import generate
from vllm_parade.tuner.config import ParadeConfig
from vllm_parade.tuner.generator import ParadeGenerator
from vllm_parade.tuner.instruction import (
    ARGUMENT,
    BatchTurns,
    Prompt,
    batch_turns,
    before_labels,
    check_labels,
    combined,
    continued_turns,
    packed_lengths,
)
from vllm_parade.tuner.layout import layout_of
from vllm_parade.tuner.standard import Observed

GENERATOR = "parade_generator"
# Keyword arguments of the base model.
MASK_ARGUMENT = "instruction_mask"
LABELS_ARGUMENT = "parade_labels"
# Factors for the initial weights of standardized generators. With these, pooled values are about one.
WIDE = {"attentional_capsule": 10.0, "dynamic_routing": 10.0, "last_token": 3.0}


class ParadeModel(BaseTuner):
    """The `base_model` of a `PeftModel` with PARADE adapters.

    The instruction of a row is its prompt: in training the tokens before the first label, otherwise all tokens in the
    attention mask. `instruction_mask` [batch, tokens] in `forward` and `generate` selects other tokens. An adapter that
    marks its instructions (`instruction_start_tokens`) has an instruction in every turn; in training, labels must not
    lie inside one. Vectors are generated in the pass that reads the instruction, and stored on the KV cache for later
    passes.

    One adapter is active at a time. Modules are hooked, not replaced, so names of base parameters do not change.
    """

    prefix = GENERATOR
    tuner_layer_cls = ParadeGenerator
    active_adapter: Any
    # Tests set float64 to remove float32 rounding from comparisons.
    pooling_dtype = torch.float32

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._layout, self._shape = layout_of(model.config), BaseModelShape.from_hf_config(model.config)
        self._prompt: Prompt | None = None
        backbone = model.get_submodule(self._layout.backbone)
        self._handles = [
            model.register_forward_pre_hook(self._default_prompt, with_kwargs=True),
            backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            backbone.register_forward_hook(self._end, with_kwargs=True),
        ]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        config = cast(ParadeConfig, peft_config).adapter_config()
        check_config(config, self._shape, None, None)
        layers = adapted_layers(config, self._shape)
        self._layout.check(self.model, layers, config.sites)
        self._targets = {f"{self._layout.layers}.{index}": index for index in layers}
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if not hasattr(target, GENERATOR):
            target.add_module(GENERATOR, ParadeGenerator(self._targets[current_key]))
            self._handles += self._hook_layer(target)
        generator = cast(ParadeGenerator, target.get_submodule(GENERATOR))
        weights = initial_generator(cast(ParadeConfig, peft_config).adapter_config(), self._shape)
        generator.add(adapter_name, weights.to(next(target.parameters()).device, torch.float32))
        generator.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _hook_layer(self, layer: nn.Module) -> Iterator[Any]:
        generator = cast(ParadeGenerator, layer.get_submodule(GENERATOR))
        yield layer.register_forward_pre_hook(partial(_enter, generator), with_kwargs=True)
        norm = layer.get_submodule(self._layout.norm)
        yield norm.register_forward_hook(partial(self._read_instruction, generator))
        for name, site in self._layout.sites.items():
            projection = layer.get_submodule(site.projection)
            yield projection.register_forward_hook(partial(self._adjust, generator, name))
        yield layer.register_forward_hook(partial(_leave, generator), always_call=True)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # The server's checks, so that PEFT refuses the same adapters.
        shape = BaseModelShape.from_hf_config(cast(Any, model).config)
        check_tensors(cast(ParadeConfig, config).adapter_config(), state_dict, shape)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, another one becomes active."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} does not exist; expected one of {', '.join(self.peft_config)}")
        del self.peft_config[adapter_name]
        for module in self.model.modules():
            if isinstance(module, ParadeGenerator):
                module.delete_adapter(adapter_name)
        if adapter_name in self.active_adapters:
            self.active_adapter = next(iter(self.peft_config), [])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: several adapters are given; their vectors are not trained together.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapters {', '.join(adapter_name)} cannot be active together; choose one")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        if merge:
            self._any_generator().merge()
        for handle in self._handles:
            handle.remove()
        for module in list(self.model.modules()):
            if hasattr(module, GENERATOR):
                delattr(module, GENERATOR)
        del self.model.peft_config
        return self.model

    @torch.no_grad()
    def standardize(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Standardize the hidden states that the active adapter reads. The adapter must be untrained.

        Most of a hidden state is common to all prompts. A randomly initialized generator reads little else, so it
        learns almost the same vectors for all prompts, as (IA)3 does. Therefore W_down is initialized and trained on
        hidden states without their common direction, with a standard deviation of one in each dimension. The saved
        W_down applies to the hidden states themselves.

        Args:
            batches: keyword arguments of the model, as in training, with the prompts of a few hundred examples; in
                rows with `labels`, only the tokens before the first label are read

        Raises:
            ValueError: the adapter has been trained, or the batches have too few tokens.
        """
        (adapter,) = self.active_adapters
        config = cast(ParadeConfig, self.peft_config[adapter])
        generators = [g for g in self.model.modules() if isinstance(g, ParadeGenerator) and adapter in g.down]
        if any(generator.weights(adapter).up.any() for generator in generators):
            raise ValueError(f"adapter {adapter!r} has been trained; only a new one can be standardized")
        training = self.model.training
        self.model.eval()
        try:
            for generator in generators:
                generator.observed = Observed(config.pooler)
            for batch in batches:
                self.model(**batch)
            for generator in generators:
                assert generator.observed is not None
                generator.standardize(adapter, generator.observed.standard(), WIDE[config.pooler])
        finally:
            for generator in generators:
                generator.observed = None
            self.model.train(training)

    def generate(self, *args: Any, instruction_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Like the base model's `generate`. The prefill generates the vectors, and all later steps use them.

        With a filled `past_key_values`, `input_ids` holds the whole conversation. Its cached tokens must have
        the turns that the cache was filled with.

        Args:
            instruction_mask: [batch, tokens], 1 at prompt tokens that instructions may contain; by default all

        Raises:
            ValueError: `prefill_chunk_size` is set, or the turns of the prompt are not those of the cache.
        """
        model = cast(Any, self.model)
        settings = kwargs.get("generation_config") or model.generation_config
        if kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None)):
            raise ValueError("prefill_chunk_size cuts the prompt, but generators need all of it in one pass; drop it")
        tokens = next((t for t in (*args, kwargs.get("inputs"), kwargs.get("input_ids")) if t is not None), None)
        self._prompt = Prompt(tokens, instruction_mask)
        try:
            return model.generate(*args, **kwargs)
        finally:
            self._prompt = None

    def _begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, labels = kwargs.pop(MASK_ARGUMENT, None), kwargs.pop(LABELS_ARGUMENT, None)
        if not self.active_adapters or self._any_generator().disable_adapters:
            return args, kwargs
        (adapter,) = self.active_adapters
        tokens = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        cache = kwargs.get("past_key_values")
        cached_tokens = 0 if cache is None else cache.get_seq_length()
        if cached_tokens:
            known, mask = BatchTurns.of_cache(cache, adapter), kwargs.get("attention_mask")
            turns = continued_turns(self._markers(adapter), self._prompt, known, cached_tokens, tokens.shape, mask)
        else:
            attended = kwargs.get("attention_mask")
            lengths = packed_lengths(kwargs.get("position_ids"), attended)
            use_cache = kwargs.get("use_cache")
            if lengths and (cast(Any, backbone).config.use_cache if use_cache is None else use_cache):
                raise ValueError("position_ids restart, as in a packed batch, which needs use_cache=False")
            if given is None and self._prompt is not None:
                given = self._prompt.mask(tokens.shape[1])
            prompts = combined(tokens.shape[:2], tokens.device, attended, given)
            ids = tokens if tokens.ndim == 2 else None
            turns = batch_turns(adapter, self._markers(adapter), ids, prompts, lengths)
        if labels is not None:
            check_labels(turns, labels != -100)
        return args, {**kwargs, ARGUMENT: turns}

    def _markers(self, adapter: str) -> TurnMarkers | None:
        return cast(ParadeConfig, self.peft_config[adapter]).adapter_config().turn_markers

    def _default_prompt(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With labels, end the instructions before the first label, because generators must not read the responses."""
        labels = kwargs.get("labels")
        if labels is None or not self.active_adapters:
            return args, kwargs
        if self._markers(self.active_adapters[0]) is not None:
            return args, {**kwargs, LABELS_ARGUMENT: labels}
        if kwargs.get(MASK_ARGUMENT) is not None:
            return args, kwargs
        lengths = packed_lengths(kwargs.get("position_ids"), kwargs.get("attention_mask"))
        return args, {**kwargs, MASK_ARGUMENT: before_labels(labels, lengths)}

    def _end(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if ARGUMENT in kwargs and cache is not None:
            setattr(cache, ARGUMENT, kwargs[ARGUMENT])

    def _any_generator(self) -> ParadeGenerator:
        return next(module for module in self.model.modules() if isinstance(module, ParadeGenerator))

    def _read_instruction(
        self, generator: ParadeGenerator, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        """Generate the layer's vectors, after the norm between the layer's input and the attention's input."""
        turns = generator.turns
        if turns is None or turns.positions is None or turns.adapter not in generator.down:
            return
        config = cast(ParadeConfig, self.peft_config[turns.adapter])
        hidden = args[0] if config.generator_input == "layer_input" else output
        if generator.observed is not None:
            generator.observed.add(*turns.read(hidden))
            return
        # Rounded to the model's dtype, as in the server.
        weights = generator.weights(turns.adapter).to(hidden.device, hidden.dtype)
        vectors = generate(
            *turns.read(hidden),
            **vars(weights),
            pooler=config.pooler,
            activation=config.activation,
            pooling_dtype=self.pooling_dtype,
        )
        turns.write(generator.layer_idx, vectors)

    def _adjust(
        self, generator: ParadeGenerator, site: str, projection: nn.Module, args: Any, output: Tensor
    ) -> Tensor:
        """Scale a projection's output by each token's vector. Return it unchanged if the site has no vectors."""
        turns = generator.turns
        table = None if turns is None else turns.table(generator.layer_idx)
        if turns is None or table is None:
            return output
        sites = cast(ParadeConfig, self.peft_config[turns.adapter]).sites
        if site not in sites:
            return output
        part = table.split([self._shape.widths[name] for name in sites], dim=-1)[sites.index(site)]
        return self._layout.sites[site].scale(output, part[turns.token_rows.to(part.device)])


def _enter(generator: ParadeGenerator, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    generator.turns = kwargs.pop(ARGUMENT, None)
    return args, kwargs


def _leave(generator: ParadeGenerator, layer: nn.Module, args: Any, output: Any) -> None:
    generator.turns = None
