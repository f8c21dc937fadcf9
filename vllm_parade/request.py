# SPDX-License-Identifier: Apache-2.0
"""Values passed between processes: the adapter of a request, and the scheduler's plan of a step for the workers."""

from dataclasses import dataclass, field, replace
from typing import Any

# Key of the instruction in SamplingParams.extra_args.
EXTRA_ARGS_KEY = "parade"
# Attribute of SchedulerOutput that holds the StepPlan.
PLAN_ATTRIBUTE = "parade_plan"
# The row of ones. Base-model requests and padding use it.
IDENTITY_ROW = 0


@dataclass
class ParadeRequest:
    """The adapter to apply to a request; the counterpart of `LoRARequest`.

    An engine reads an adapter when a request first uses its name and path. Later changes of the files have no effect.
    To serve changed weights, use a new name or a new path.
    """

    parade_name: str
    """Name of the adapter."""
    parade_path: str
    """Folder with adapter_config.json and adapter_model.safetensors."""
    instruction_tokens: int | None = None
    """Number of tokens at the start of the prompt that the generators read. None means the whole prompt."""
    base_model_name: str | None = None
    """Parent shown in /v1/models."""
    freeze_instruction: bool = field(default=False, repr=False)
    """Whether the first prompt sets `instruction_tokens`. In beam search, later prompts contain generated tokens."""

    def __post_init__(self) -> None:
        if not self.parade_name:
            raise ValueError("parade_name is empty; give the adapter a name")
        if not self.parade_path:
            raise ValueError(f"parade_path of {self.parade_name!r} is empty; give the adapter's folder")
        self.parade_path = str(self.parade_path)
        tokens = self.instruction_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise ValueError(f"instruction_tokens is {tokens!r}; expected a positive whole number or None")

    def for_beam_search(self) -> "ParadeRequest":
        """A copy for one prompt of a beam search. All steps use the instruction of the first step."""
        return replace(self, freeze_instruction=True)

    # vLLM's front end carries this object in the place of a LoRARequest and reads these attributes.
    @property
    def lora_name(self) -> str:
        """Name under which vLLM's front end lists the adapter."""
        return self.parade_name

    @property
    def lora_path(self) -> str:
        """Folder of the adapter."""
        return self.parade_path

    @property
    def path(self) -> str:
        """Folder of the adapter."""
        return self.parade_path

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.parade_name

    @property
    def lora_int_id(self) -> int:
        """Always 1: vLLM takes 0 to mean "no adapter"."""
        return 1


# Content hash of the adapter, and hash of the instruction's tokens. Vectors depend on nothing else.
InstructionKey = tuple[str, str]


@dataclass(frozen=True)
class Instruction:
    """What the generators read for a request: the first `tokens` tokens of its prompt, under `adapter`."""

    adapter: str
    """Content hash of the adapter."""
    tokens: int
    digest: str
    """Hash of these tokens."""

    @property
    def key(self) -> InstructionKey:
        """Key of the vectors. Equal keys mean equal vectors."""
        return self.adapter, self.digest

    def to_extra_args(self) -> dict[str, str | int]:
        """The instruction as plain values: msgpack carries no classes from front end to engine core."""
        return {"adapter": self.adapter, "tokens": self.tokens, "digest": self.digest}

    @classmethod
    def from_extra_args(cls, extra_args: dict | None) -> "Instruction | None":
        """Read `SamplingParams.extra_args`. Returns None for a request of the base model."""
        values = (extra_args or {}).get(EXTRA_ARGS_KEY)
        return None if values is None else cls(**values)


@dataclass(frozen=True)
class StepPlan:
    """The scheduler's plan of one step, for the workers."""

    rows: dict[str, int]
    """Row of every scheduled PARADE request, by request id."""
    instructions: dict[str, Instruction]
    """Instructions that run in this step, by request id. Generators write the rows of these requests."""
    slots: dict[str, int] = field(default_factory=dict)
    """Slot of every adapter of `instructions`, by content hash."""
    upcoming: dict[str, int] = field(default_factory=dict)
    """Slots for adapters of waiting requests, by content hash, in the order in which the adapters are needed. Workers
    fill them while this step runs; this step does not read them."""


EMPTY_PLAN = StepPlan(rows={}, instructions={})


def plan_of(scheduler_output: Any) -> StepPlan:
    """The plan of a SchedulerOutput. Empty for a worker's own warm-up steps, which have none.

    Raises:
        RuntimeError: a PARADE request has no plan. Without this check, it would get the base model's answer.
    """
    plan: StepPlan | None = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
    if plan is not None:
        return plan
    for request in scheduler_output.scheduled_new_reqs:
        params = request.sampling_params
        if params is not None and Instruction.from_extra_args(params.extra_args) is not None:
            raise RuntimeError(f"request {request.req_id} names an adapter, but the step has no PARADE plan")
    return EMPTY_PLAN
