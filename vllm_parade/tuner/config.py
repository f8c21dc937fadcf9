# SPDX-License-Identifier: Apache-2.0
"""An adapter's settings as a PEFT config."""

from dataclasses import dataclass, field, fields

from peft import PeftConfig, PeftType, TaskType

from vllm_parade.adapter.config import DEFAULT_SITES, AdapterConfig


@dataclass
class ParadeConfig(PeftConfig):
    """Settings of a PARADE adapter, for `peft.get_peft_model`. Saving writes the server's `adapter_config.json`.

    Raises:
        AdapterError: names the field, its value and what was expected.
    """

    task_type: str | None = field(default=TaskType.CAUSAL_LM, metadata={"help": "Only causal language models."})
    # PEFT reads this attribute. `layers_to_transform` selects the decoder layers instead.
    target_modules = None

    r: int = field(default=12, metadata={"help": "Bottleneck size of the generators; a multiple of num_capsules."})
    num_capsules: int = field(default=4, metadata={"help": "Output capsules of the pooler."})
    pooler: str = field(
        default="attentional_capsule",
        metadata={
            "help": "How the instruction's tokens are pooled: attentional_capsule, dynamic_routing (PARADE-2) "
            "or last_token (PARADE-1)."
        },
    )
    activation: str = field(
        default="gelu", metadata={"help": "Activation between pooler and up projection: gelu, relu, silu or tanh."}
    )
    sites: list[str] = field(
        default_factory=lambda: list(DEFAULT_SITES),
        metadata={"help": "Projections whose outputs are scaled, out of q, k, v, gate, up."},
    )
    generator_input: str = field(
        default="layer_input",
        metadata={
            "help": "Input of the generator: layer_input (the residual stream) or attention_input (the same after "
            "the layer's first norm)."
        },
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the layers that have a generator; None means all."}
    )

    instruction_start_tokens: list[int] | None = field(
        default=None,
        metadata={"help": "Token ids that begin a turn; None means that the whole prompt is one instruction."},
    )
    instruction_end_tokens: list[int] | None = field(
        default=None, metadata={"help": "Token ids that end the instruction of a turn."}
    )
    instruction_max_tokens: int | None = field(
        default=None, metadata={"help": "Largest number of tokens in an instruction of a turn; None for no limit."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PARADE
        checked = self.adapter_config()
        # As in the server's config, with lists instead of tuples, which JSON lacks.
        for name, value in vars(checked).items():
            if isinstance(value, tuple):
                setattr(self, name, list(value))

    def adapter_config(self) -> AdapterConfig:
        """The same settings as the server's config, validated."""
        names = {known.name for known in fields(AdapterConfig)}
        values = {known.name: getattr(self, known.name) for known in fields(self) if known.name in names}
        return AdapterConfig(**values)
