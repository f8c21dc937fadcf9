# SPDX-License-Identifier: Apache-2.0
"""Values passed between processes: the adapter of a request, and the scheduler's plan of a step for the workers."""

import sys
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
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


# Content hash of the adapter, and digest of the instruction. Vectors depend on nothing else.
InstructionKey = tuple[str, str]


@dataclass(frozen=True)
class Instruction:
    """The tokens [start, end) of a prompt, which the generators of `adapter` read."""

    adapter: str
    """Content hash of the adapter."""
    start: int
    end: int
    digest: str
    """Hash of the prompt up to `end`, of its turns up to this one, and of the client's cache salt."""

    @property
    def key(self) -> InstructionKey:
        """Key of the vectors. Equal keys mean equal vectors."""
        return self.adapter, self.digest

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class Conversation:
    """The turns of a request's prompt under an adapter, found when the request is admitted.

    Turn i reaches from the start of instruction i to the start of the next one, the last turn to the end of the
    sequence. Tokens before the first instruction are the base model's.
    """

    instructions: tuple[Instruction, ...]

    @property
    def adapter(self) -> str:
        """Content hash of the adapter."""
        return self.instructions[0].adapter

    @cached_property
    def starts(self) -> list[int]:
        """Where the turns start."""
        return [instruction.start for instruction in self.instructions]

    def turn_at(self, position: int) -> int:
        """Number of the turn that a token belongs to; -1 for a token of the base model."""
        return bisect_right(self.starts, position) - 1

    def start_of(self, turn: int) -> int:
        """Where a turn starts; beyond any sequence for the turn after the last one."""
        return self.starts[turn] if turn < len(self.starts) else sys.maxsize

    def to_extra_args(self) -> dict[str, Any]:
        """The turns as plain values: msgpack carries no classes from front end to engine core."""
        turns = [[instruction.start, instruction.end, instruction.digest] for instruction in self.instructions]
        return {"adapter": self.adapter, "turns": turns}

    @classmethod
    def from_extra_args(cls, extra_args: dict | None) -> "Conversation | None":
        """Read `SamplingParams.extra_args`. Returns None for a request of the base model."""
        values = (extra_args or {}).get(EXTRA_ARGS_KEY)
        if values is None:
            return None
        return cls(tuple(Instruction(values["adapter"], *turn) for turn in values["turns"]))


@dataclass(frozen=True)
class Reading:
    """A generator's work in a step: read an instruction and write its vectors into `row`."""

    instruction: Instruction
    offset: int
    """First token of the instruction, counted from the request's first token in the step."""
    row: int


@dataclass(frozen=True)
class StepPlan:
    """What the scheduler tells the workers about one step."""

    rows: dict[str, int]
    """Row that scales the tokens of a request, by request id; requests that are left out have the identity row."""
    readings: dict[str, Reading]
    """Instructions that pass in this step, so that their row must be generated, by request id."""
    borders: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Requests whose tokens of this step belong to two turns: number of tokens before the second turn, and its row."""
    slots: dict[str, int] = field(default_factory=dict)
    """Slot of every adapter that reads one of these instructions, by content hash."""
    upcoming: dict[str, int] = field(default_factory=dict)
    """Slots for the adapters of waiting requests, filled while this step runs, the first needed first. This step does
    not read them."""


EMPTY_PLAN = StepPlan(rows={}, readings={})


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
        if params is not None and Conversation.from_extra_args(params.extra_args) is not None:
            raise RuntimeError(f"request {request.req_id} names an adapter, but the step has no PARADE plan")
    return EMPTY_PLAN
