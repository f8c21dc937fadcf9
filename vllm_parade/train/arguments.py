# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m vllm_parade.train`: Transformers' own training arguments and a few of ours."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_parade.train.command import require_modules
from vllm_parade.train.methods import METHODS
from vllm_parade.train.tasks import TASKS
from vllm_parade.train.templates import TEMPLATES

# Below so many examples a batch has 16 of them, else 128.
FEW_EXAMPLES = 10_000


def _argument(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class AdapterArguments:
    """What is trained, on what."""

    model: str = field(metadata={"help": "base model, a folder or a name on the Hub"})
    method: str = _argument("parade", f"one of {', '.join(METHODS)}", choices=list(METHODS))
    peft: dict | str | None = _argument(
        None,
        "settings of the method's PEFT config, as a mapping in YAML or as JSON",
    )
    standardize: bool = _argument(
        False,
        "let PARADE's generators begin by reading what tells prompts apart, by a look at some of the training prompts; "
        "for a mixture of tasks, with --bias_lr_ratio 10 and the pooler last_token",
    )
    bias_lr_ratio: float = _argument(1.0, "how much faster than the rest of a PARADE adapter b_up learns")
    dtype: str = _argument("auto", "of the base model: auto (bfloat16 on a GPU, else float32), bfloat16, float32, ...")
    base_name: str | None = _argument(None, "the base model's name in adapter and card; default: what --model says")
    task: list[str] = field(
        default_factory=list,
        metadata={"help": f"out of {', '.join(TASKS)}; several make one mixture", "choices": list(TASKS)},
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "folder of each task's files, in the order of --task"}
    )
    train_file: str | None = _argument(None, 'instead of a task: a file of lines {"prompt": ..., "response": ...}')
    dev_file: str | None = _argument(None, "likewise for dev; without it every tenth training example, at most 200")
    dataset: str | None = _argument(None, 'instead of both: a data set of the Hub with columns "prompt" and "response"')
    template: str = _argument(
        "chat", "what stands around a prompt: chat, llama2 (the paper's) or plain", choices=list(TEMPLATES)
    )
    attention: str = _argument("sdpa", "eager, sdpa, or xformers: that one on GPUs, with --packed")
    packed: bool = _argument(False, "lay the examples of a batch end to end in one row instead of padding them")
    max_length: int | None = _argument(None, "tokens; longer examples are left out")
    dev_rows: int | None = _argument(None, "examples of dev to look at; default: all")
    metric_rows: int = _argument(200, "dev examples answered for the task's metric at every evaluation; 0 for none")

    def __post_init__(self) -> None:
        self.peft = self._settings()
        if self.method != "parade" and (self.standardize or self.bias_lr_ratio != 1):
            raise ValueError(f"--standardize and --bias_lr_ratio are for PARADE; drop them with --method {self.method}")
        if self.bias_lr_ratio < 0:
            raise ValueError(f"--bias_lr_ratio is {self.bias_lr_ratio}; expected 0 or more")
        for name, least in (("max_length", 1), ("dev_rows", 1), ("metric_rows", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; expected {least} or more")
        self._check_model_options()
        self._check_data()

    def _check_model_options(self) -> None:
        dtype = getattr(torch, self.dtype, None)
        if self.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"--dtype is {self.dtype}; expected auto, bfloat16, float16 or float32")
        known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
        # A name with / or | is a kernel on the Hub.
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
                "--dev_file is for --train_file; drop it: tasks and data sets have a dev split of their own"
            )
        for folder in self.data:
            if not Path(folder).is_dir():
                raise ValueError(f"--data names {folder!r}, which is no folder")

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

    output_dir: str = _argument("adapter", "folder of the adapter, and of checkpoints while it is trained")
    learning_rate: float = _argument(1e-4, "highest learning rate of AdamW; small models want more: 5e-3 for 135M")
    lr_scheduler_type: str = _argument("linear", "how the learning rate falls")
    warmup_steps: float = _argument(0.06, "steps in which the learning rate rises; below 1, their share")
    num_train_epochs: float = _argument(10.0, "passes over the training examples, at most")
    per_device_train_batch_size: int = _argument(0, f"0: 16 below {FEW_EXAMPLES:,} examples, else 128")
    per_device_eval_batch_size: int = _argument(64, "examples")
    eval_strategy: str = _argument("steps", "steps or epoch")
    eval_steps: float = _argument(200, "steps between evaluations on dev, each with a checkpoint")
    save_strategy: str = _argument("steps", "as eval_strategy")
    save_steps: float = _argument(200, "as eval_steps")
    save_total_limit: int | None = _argument(1, "checkpoints that are kept beside the best")
    patience: int = _argument(10, "evaluations without a better dev loss after which training ends")
    load_best_model_at_end: bool = _argument(True, "whether the checkpoint that is best on dev is the result")
    metric_for_best_model: str | None = _argument("eval_loss", "eval_loss, or eval_metric for the task's own")
    train_sampling_strategy: str = _argument("group_by_length", "batches of like lengths, in random order")
    logging_steps: float = _argument(20, "steps between lines in the log")
    report_to: None | str | list[str] = _argument("none", "none, tensorboard, ...")
    remove_unused_columns: bool = _argument(False, "leave it")

    def batch_for(self, examples: int) -> None:
        """Settle the batch size, if it was left open."""
        if not self.per_device_train_batch_size:
            self.per_device_train_batch_size = 16 if examples < FEW_EXAMPLES else 128
