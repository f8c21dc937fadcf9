# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m vllm_parade.train`: Transformers' training arguments and some of its own."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_parade.train.command import require_modules
from vllm_parade.train.methods import METHODS
from vllm_parade.train.tasks import TASKS
from vllm_parade.train.templates import TEMPLATES

# With fewer examples, the default batch size is 16, else 128.
FEW_EXAMPLES = 10_000


def _argument(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class AdapterArguments:
    """Base model, method and data."""

    model: str = field(metadata={"help": "base model, a folder or a name on the Hub"})
    method: str = _argument("parade", f"one of {', '.join(METHODS)}", choices=list(METHODS))
    peft: dict | str | None = _argument(
        None,
        "settings of the method's PEFT config, as a mapping in YAML or as JSON",
    )
    standardize: bool = _argument(
        False,
        "standardize the hidden states that PARADE's generators read, on 256 training prompts, so that training "
        "starts on how prompts differ; for a mixture of tasks, with --bias_lr_ratio 10 and the pooler last_token",
    )
    turns: bool = _argument(
        False,
        "give every turn of a conversation its own vectors, as the tokenizer's chat template marks turns, and learn "
        "the answers of all turns",
    )
    max_instruction_tokens: int | None = _argument(
        None, "with --turns: largest number of tokens that are read of a question, its last ones; default: all"
    )
    bias_lr_ratio: float = _argument(1.0, "learning rate of a PARADE adapter's b_up, as a multiple of --learning_rate")
    dtype: str = _argument("auto", "of the base model: auto (bfloat16 on a GPU, else float32), bfloat16, float32, ...")
    base_name: str | None = _argument(None, "name of the base model in the adapter and its card; default: --model")
    task: list[str] = field(
        default_factory=list,
        metadata={"help": f"any of {', '.join(TASKS)}; several form one mixture", "choices": list(TASKS)},
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "folder of each task's files, in the order of --task"}
    )
    train_file: str | None = _argument(
        None,
        'instead of --task: a file of lines {"prompt": ..., "response": ...} or '
        '{"messages": [{"role": ..., "content": ...}, ...]}',
    )
    dev_file: str | None = _argument(
        None, "dev data for --train_file, in the same format; default: every tenth training example, at most 200"
    )
    dataset: str | None = _argument(
        None,
        'instead of --task and --train_file: a data set on the Hub with columns "prompt" and "response", or "messages"',
    )
    template: str = _argument(
        "chat", "prompt template: chat (the tokenizer's), llama2 (the paper's) or plain", choices=list(TEMPLATES)
    )
    attention: str = _argument("sdpa", "eager, sdpa, or xformers (needs a GPU and --packed)")
    packed: bool = _argument(False, "concatenate the examples of a batch into one row instead of padding them")
    max_length: int | None = _argument(None, "maximum length in tokens; longer examples are left out")
    dev_rows: int | None = _argument(None, "number of dev examples for the dev loss; default: all")
    metric_rows: int = _argument(200, "dev examples answered at each evaluation for the task's metric; 0 for none")

    def __post_init__(self) -> None:
        self.peft = self._settings()
        if self.method != "parade" and (self.standardize or self.bias_lr_ratio != 1):
            raise ValueError(f"--standardize and --bias_lr_ratio are for PARADE; drop them with --method {self.method}")
        if self.bias_lr_ratio < 0:
            raise ValueError(f"--bias_lr_ratio is {self.bias_lr_ratio}; expected 0 or more")
        for name, least in (("max_length", 1), ("max_instruction_tokens", 1), ("dev_rows", 1), ("metric_rows", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; expected {least} or more")
        self._check_turns()
        self._check_model_options()
        self._check_data()

    def _check_turns(self) -> None:
        if not self.turns:
            if self.max_instruction_tokens is not None:
                raise ValueError(
                    f"--max_instruction_tokens is {self.max_instruction_tokens}, but there is no --turns; add it, or "
                    "drop the number"
                )
            return
        if self.method != "parade":
            raise ValueError(f"--turns is for PARADE, which reads instructions; drop it with --method {self.method}")
        if self.template != "chat":
            raise ValueError(
                f"--turns finds turns in the tokenizer's chat template, but --template is {self.template}; give chat"
            )
        given = sorted(name for name in cast(dict, self.peft) if name.startswith("instruction_"))
        if given:
            raise ValueError(f"--turns sets the markers that --peft gives, {', '.join(given)}; drop one of the two")

    def _check_model_options(self) -> None:
        dtype = getattr(torch, self.dtype, None)
        if self.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"--dtype is {self.dtype}; expected auto, bfloat16, float16 or float32")
        known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
        # A name with / or | refers to a kernel on the Hub.
        if self.attention not in known and not {"/", "|"} & set(self.attention):
            raise ValueError(f"--attention is {self.attention}; expected one of {', '.join(known)}")
        if self.attention == "xformers":
            if not torch.cuda.is_available():
                raise ValueError("--attention is xformers, which needs a GPU; give sdpa")
            require_modules("xformers")

    def _check_data(self) -> None:
        sources = [name for name in ("task", "train_file", "dataset") if getattr(self, name)]
        if len(sources) != 1:
            given = ", ".join(f"--{name}" for name in sources) or "none"
            raise ValueError(f"give one of --task, --train_file and --dataset; got {given}")
        if len(self.data) != len(self.task):
            raise ValueError(f"--data names {len(self.data)} folders for {len(self.task)} tasks; give one for each")
        if self.dev_file and not self.train_file:
            raise ValueError(
                "--dev_file is for --train_file; drop it, because tasks and data sets have their own dev split"
            )
        for folder in self.data:
            if not Path(folder).is_dir():
                raise ValueError(f"--data names {folder!r}, which is not a folder; give a folder for each task")

    def _settings(self) -> dict[str, Any]:
        if not isinstance(self.peft, str):
            return self.peft or {}
        try:
            return dict(json.loads(self.peft))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--peft got {self.peft!r}, which is no JSON object: {error}") from None


@dataclass
class PromptTrainingArguments(TrainingArguments):
    """Transformers' training arguments with the paper's settings as defaults."""

    output_dir: str = _argument("adapter", "folder for the adapter, and for checkpoints during training")
    learning_rate: float = _argument(1e-4, "peak learning rate of AdamW; small models need more: 5e-3 for 135M")
    lr_scheduler_type: str = _argument("linear", "learning-rate schedule after warmup")
    warmup_steps: float = _argument(0.06, "number of warmup steps; below 1, their share of all steps")
    num_train_epochs: float = _argument(10.0, "maximum number of passes over the training examples")
    per_device_train_batch_size: int = _argument(0, f"0: 16 with fewer than {FEW_EXAMPLES:,} examples, else 128")
    per_device_eval_batch_size: int = _argument(64, "batch size for the dev loss")
    eval_strategy: str = _argument("steps", "steps or epoch")
    eval_steps: float = _argument(200, "steps between evaluations on dev")
    save_strategy: str = _argument("steps", "same as eval_strategy")
    save_steps: float = _argument(200, "steps between checkpoints; same as eval_steps")
    save_total_limit: int | None = _argument(1, "number of checkpoints to keep besides the best one")
    patience: int = _argument(10, "training stops after this many evaluations without a better dev loss")
    load_best_model_at_end: bool = _argument(True, "save the checkpoint with the best dev result, not the last one")
    metric_for_best_model: str | None = _argument("eval_loss", "eval_loss, or eval_metric for the task's metric")
    train_sampling_strategy: str = _argument("group_by_length", "batches of similar lengths, in random order")
    logging_steps: float = _argument(20, "steps between log lines")
    report_to: None | str | list[str] = _argument("none", "none, tensorboard, ...")
    remove_unused_columns: bool = _argument(False, "keep it off")

    def batch_for(self, examples: int) -> None:
        """Set the default batch size for this number of examples, if none was given."""
        if not self.per_device_train_batch_size:
            self.per_device_train_batch_size = 16 if examples < FEW_EXAMPLES else 128
