# SPDX-License-Identifier: Apache-2.0
"""The content of `adapter_config.json`, with a check of each value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_parade.adapter.turns import TurnMarkers
from vllm_parade.ops.reference import ACTIVATIONS, POOLERS

PEFT_TYPE = "PARADE"
# Order in which the up projection concatenates the sites' vectors.
SITES = ("q", "k", "v", "gate", "up")
DEFAULT_SITES = ("q", "v", "up")
GENERATOR_INPUTS = ("layer_input", "attention_input")
# Keys that PEFT writes into every config. They do not affect the mathematics.
PEFT_KEYS = ("auto_mapping", "peft_version")


class AdapterError(ValueError):
    """The adapter cannot be used. The message names the file, the value and what was expected."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one adapter. The fields are the keys of `adapter_config.json`."""

    base_model_name_or_path: str | None = None
    """The model the adapter was trained on."""
    task_type: str | None = None
    """PEFT's task type, e.g. CAUSAL_LM."""
    revision: str | None = None
    """Revision of the base model."""
    inference_mode: bool = True
    """Whether the adapter was saved for inference, as in PEFT."""
    r: int = 12
    """Bottleneck size of the generators; a multiple of `num_capsules`."""
    num_capsules: int = 4
    """Output capsules of the pooler."""
    pooler: str = "attentional_capsule"
    """How the instruction's tokens are pooled: attentional_capsule, dynamic_routing or last_token."""
    activation: str = "gelu"
    """Activation between pooler and up projection: gelu (exact), relu, silu or tanh."""
    sites: tuple[str, ...] = DEFAULT_SITES
    """Base projections whose outputs are scaled, out of q, k, v, gate, up."""
    generator_input: str = "layer_input"
    """Input of the generator: layer_input (the residual stream) or attention_input (after the layer's first norm)."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the layers that have a generator; None means all."""

    instruction_start_tokens: tuple[int, ...] | None = None
    """Token ids that begin a turn; None means that the whole prompt is one instruction."""
    instruction_end_tokens: tuple[int, ...] | None = None
    """Token ids that end the instruction of a turn."""
    instruction_max_tokens: int | None = None
    """Largest number of tokens in an instruction of a turn; None for no limit."""

    def __post_init__(self) -> None:
        for name in ("r", "num_capsules"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise AdapterError(f"{name} is {value!r}; expected a positive whole number")
        if self.r % self.num_capsules and self.pooler != "last_token":
            raise AdapterError(f"r is {self.r}, not a multiple of num_capsules, {self.num_capsules}; change either")
        self._check_choice("pooler", POOLERS)
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_choice("generator_input", GENERATOR_INPUTS)
        self._check_lists()
        self._check_markers()
        self._check_peft_keys()

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise AdapterError(f"{name} is {value!r}; expected one of {', '.join(choices)}")

    def _check_lists(self) -> None:
        sites = self.sites
        known = isinstance(sites, (list, tuple)) and all(site in SITES for site in sites)
        if not known or not sites or len(set(sites)) < len(sites):
            raise AdapterError(f"sites is {sites!r}; expected a list of different sites out of {', '.join(SITES)}")
        # The order in the file does not matter: vectors are always concatenated in the order of SITES.
        object.__setattr__(self, "sites", tuple(site for site in SITES if site in self.sites))
        layers = self.layers_to_transform
        if layers is None:
            return
        whole = isinstance(layers, (list, tuple)) and all(type(i) is int and i >= 0 for i in layers)
        if not whole or not layers or len(set(layers)) < len(layers):
            raise AdapterError(f"layers_to_transform is {layers!r}; expected different layer numbers, or null")
        object.__setattr__(self, "layers_to_transform", tuple(sorted(layers)))

    def _check_markers(self) -> None:
        names = ("instruction_start_tokens", "instruction_end_tokens")
        for name in names:
            tokens = getattr(self, name)
            if tokens is None:
                continue
            whole = isinstance(tokens, (list, tuple)) and all(type(token) is int and token >= 0 for token in tokens)
            if not whole or not tokens:
                raise AdapterError(f"{name} is {tokens!r}; expected a list of token ids, or null")
            object.__setattr__(self, name, tuple(tokens))
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) == 1:
            (missing,) = set(names) - set(given)
            raise AdapterError(f"{given[0]} is given without {missing}; give both or neither")
        most = self.instruction_max_tokens
        if most is not None and (type(most) is not int or most < 1):
            raise AdapterError(f"instruction_max_tokens is {most!r}; expected a positive whole number, or null")
        if most is not None and not given:
            raise AdapterError(f"instruction_max_tokens is {most}, but there are no {names[0]}; give them or drop it")

    @property
    def turn_markers(self) -> TurnMarkers | None:
        """How the adapter marks its instructions; None means that the whole prompt is one instruction."""
        if self.instruction_start_tokens is None or self.instruction_end_tokens is None:
            return None
        return TurnMarkers(self.instruction_start_tokens, self.instruction_end_tokens, self.instruction_max_tokens)

    def _check_peft_keys(self) -> None:
        for name in ("base_model_name_or_path", "task_type", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise AdapterError(f"{name} is {value!r}; expected a string or null")
        if not isinstance(self.inference_mode, bool):
            raise AdapterError(f"inference_mode is {self.inference_mode!r}; expected true or false")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """Read the content of `adapter_config.json`.

        Raises:
            AdapterError: names the key, its value and what was expected.
        """
        if values.get("peft_type") != PEFT_TYPE:
            raise AdapterError(f"peft_type is {values.get('peft_type')!r}; expected {PEFT_TYPE!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - {"peft_type", *PEFT_KEYS})
        if unknown:
            raise AdapterError(f"unknown key {unknown[0]!r}; known are peft_type, {', '.join(sorted(known))}")
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"peft_type": PEFT_TYPE, **values}
