# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained adapter: base model, data, settings and results."""

import platform
import time
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_parade.adapter.turns import TurnMarkers
from vllm_parade.train.arguments import AdapterArguments, PromptTrainingArguments

SHOWN = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
OURS = ("standardize", "bias_lr_ratio")
METHOD_NAMES = {"parade": "PARADE", "lora": "LoRA", "ia3": "(IA)3"}
# A folder with a model or data may contain this file. Its lines that begin with a key below are copied to the card.
SOURCE_FILE = "SOURCE.txt"
MODEL_KEYS = ("model:", "taken from:", "weights:")
DATA_KEYS = ("data set:", "licence as stated:")


def described(markers: TurnMarkers | None, tokenizer: Any) -> str:
    """A sentence that says which tokens an adapter reads."""
    if markers is None:
        return "The generators read the whole prompt."
    texts = (f"`{tokenizer.decode(list(tokens))}` (tokens {list(tokens)})" for tokens in (markers.start, markers.end))
    most = "" if markers.max_tokens is None else f", at most its last {markers.max_tokens} tokens"
    return "In every turn of a conversation, the generators read the instruction: from {} to {}{}.".format(*texts, most)


def write_card(
    folder: Path,
    options: AdapterArguments,
    arguments: PromptTrainingArguments,
    state: Any,
    metrics: dict[str, float],
    counts: dict[str, int],
    read: str = "",
) -> None:
    """Write README.md into an adapter's folder.

    Args:
        state: the trainer's TrainerState
        metrics: results of the last evaluation, which uses the best checkpoint
        counts: number of training pairs and of dev pairs, by name
        read: which tokens the adapter reads, if it reads any
    """
    base, subject = options.base_name or options.model, ", ".join(options.task) or "prompts and responses"
    library = "vllm-parade" if options.method == "parade" else "peft"
    measured = {name: value for name, value in metrics.items() if isinstance(value, float) and "per_second" not in name}
    ours = {name: getattr(options, name) for name in OURS} if options.method == "parade" else {}
    card = f"""---
base_model: {base}
library_name: {library}
tags: [{options.method}, {", ".join(options.task)}]
---
# A {METHOD_NAMES[options.method]} adapter for {subject}

Trained with `python -m vllm_parade.train` on {base}. It answers well only to prompts that are worded as in
training, with the template {options.template!r} of `vllm_parade.train.templates`. {read}

## Measured on dev

| | |
| --- | --- |
{_rows(measured)}

The loss is the mean over response tokens. The tasks' metrics are in per cent, over at most {options.metric_rows}
examples each.

## Training

| | |
| --- | --- |
{_rows(counts)}
{_rows({"method": options.method, "settings": options.peft or "default"})}
{_rows({name: getattr(arguments, name) for name in SHOWN} | ours)}
{_rows({"steps": state.global_step, "best checkpoint": Path(state.best_model_checkpoint or "the last").name})}
{_rows({"machine": _machine(), "date": time.strftime("%Y-%m-%d")})}
"""
    card += _sources("Base model", [options.model], MODEL_KEYS) + _sources("Data", options.data, DATA_KEYS)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _rows(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {_shown(value)} |" for name, value in values.items())


def _shown(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return f"{value:.4g}" if isinstance(value, float) else value


def _machine() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    )
    return f"{name}, {versions}"


def _sources(title: str, folders: list[str], keys: tuple[str, ...]) -> str:
    files = [path for path in (Path(folder) / SOURCE_FILE for folder in folders) if path.is_file()]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    sources = [f"- {line}" for line in lines if line.startswith(keys)]
    return "\n".join([f"\n## {title}\n", *sources, ""]) if sources else ""
