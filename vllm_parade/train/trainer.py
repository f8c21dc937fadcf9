# SPDX-License-Identifier: Apache-2.0
"""Transformers' Trainer, which also answers dev prompts, and an adapter's whole way from base model to folder."""

import random
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from vllm_parade.train.answers import score
from vllm_parade.train.arguments import AdapterArguments, PromptTrainingArguments
from vllm_parade.train.card import write_card
from vllm_parade.train.data import Collator, encode
from vllm_parade.train.methods import peft_config
from vllm_parade.train.readers import Splits, as_example, read_jsonl
from vllm_parade.train.tasks import TASKS, mixture

# Whose prompts --standardize looks at.
STANDARD_PAIRS = 256


class PromptTrainer(Trainer):
    """Adds the tasks' own metric to every evaluation, as `eval_metric`: the mean over the tasks."""

    def __init__(self, *args: Any, options: AdapterArguments, tasks: dict[str, Splits], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options, self.tasks = options, tasks

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Transformers' own, in which b_up has its learning rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in list(optimizer.param_groups) if self.options.bias_lr_ratio != 1 else ():
            biases = [parameter for parameter in group["params"] if names[parameter].endswith(".bias")]
            group["params"] = [parameter for parameter in group["params"] if not names[parameter].endswith(".bias")]
            optimizer.add_param_group({**group, "params": biases, "lr": group["lr"] * self.options.bias_lr_ratio})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Dev loss and, where a task is trained, its metric over the first of its dev examples."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        rows, model = self.options.metric_rows, self.accelerator.unwrap_model(self.model)
        scores = {
            name: score(TASKS[name], model, self.processing_class, splits.dev[:rows], self.options.template)
            for name, splits in (self.tasks.items() if rows else ())
        }
        if scores:
            found = {f"eval_{name}": value for name, value in scores.items()}
            found["eval_metric"] = sum(scores.values()) / len(scores)
            self.log(found)
            metrics |= found
        return metrics


def load_base(options: AdapterArguments) -> tuple[Any, Any]:
    """Base model and tokenizer."""
    dtype: Any = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, dtype), attn_implementation=options.attention
    )
    model.config.use_cache = False
    return model, tokenizer


def load_data(options: AdapterArguments) -> tuple[Splits, dict[str, Splits]]:
    """All examples together, and those of each task."""
    if options.train_file:
        return read_jsonl(Path(options.train_file), Path(options.dev_file) if options.dev_file else None), {}
    if options.dataset:
        return _hub_data(options.dataset), {}
    tasks = {name: TASKS[name].read(Path(folder)) for name, folder in zip(options.task, options.data, strict=True)}
    return mixture(list(tasks.values())), tasks


def _hub_data(name: str) -> Splits:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"--dataset {name} needs the package datasets; pip install datasets") from error
    parts = {
        split: [as_example(row, f"{name}, {split} row {number}") for number, row in enumerate(rows)]
        for split, rows in load_dataset(name).items()
    }
    dev = parts.get("validation") or parts.get("dev") or parts["train"][::10][:200]
    return Splits.without_overlap(parts["train"], dev, parts.get("test", []))


def train(options: AdapterArguments, arguments: PromptTrainingArguments) -> dict[str, float]:
    """Train an adapter and leave it in `arguments.output_dir`, with a model card.

    Returns:
        what the last evaluation found, of the best checkpoint
    """
    set_seed(arguments.seed)
    base, tokenizer = load_base(options)
    splits, tasks = load_data(options)
    splits.dev[:] = splits.dev[: options.dev_rows]
    pairs, dev = (encode(tokenizer, part, options.template, options.max_length) for part in (splits.train, splits.dev))
    arguments.batch_for(len(pairs))
    model = get_peft_model(base, peft_config(options.method, cast(dict, options.peft)))
    model.peft_config["default"].base_model_name_or_path = options.base_name or options.model
    model.print_trainable_parameters()
    trainer = PromptTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        eval_dataset=dev,
        data_collator=DataCollatorWithFlattening() if options.packed else Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(arguments.patience)] if arguments.load_best_model_at_end else [],
        options=options,
        tasks=tasks,
    )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    if options.standardize:
        _standardize(model, trainer, pairs)
    trainer.train(resume_from_checkpoint=_checkpoint(arguments))
    metrics = trainer.evaluate()
    state = adapter_state(model, base.dtype)
    if trainer.is_world_process_zero():
        trainer.save_state()
        model.save_pretrained(arguments.output_dir, state_dict=state)
        counts = {"training pairs": len(pairs), "dev pairs": len(dev)}
        write_card(Path(arguments.output_dir), options, arguments, trainer.state, metrics, counts)
    return metrics


def _check_fsdp(trainer: PromptTrainer) -> None:
    """Refuse what needs weights whole that FSDP shards."""
    options = trainer.options
    if not trainer.accelerator.is_fsdp2:
        raise ValueError("FSDP 1 cannot join a bfloat16 base model and a float32 adapter; set fsdp_version to 2")
    if options.standardize:
        raise ValueError("--standardize needs every adapter weight whole, and FSDP shards them; train with DDP")
    if trainer.tasks and options.metric_rows:
        raise ValueError(
            f"--metric_rows is {options.metric_rows}: answers need every weight whole, and FSDP shards them; give 0, "
            "and score the adapter by python -m vllm_parade.evaluate"
        )


def _standardize(model: PeftModel, trainer: PromptTrainer, pairs: list[dict[str, list[int]]]) -> None:
    arguments, tokenizer = trainer.args, cast(Any, trainer.processing_class)
    sample = random.Random(arguments.seed).sample(pairs, min(STANDARD_PAIRS, len(pairs)))
    collate, size = Collator(tokenizer.pad_token_id), arguments.per_device_eval_batch_size
    batches = (collate(sample[start : start + size]) for start in range(0, len(sample), size))
    model.base_model.standardize(
        {name: tensor.to(arguments.device) for name, tensor in batch.items()} for batch in batches
    )


def _checkpoint(arguments: PromptTrainingArguments) -> str | None:
    asked = arguments.resume_from_checkpoint
    if asked not in ("true", "True", True):
        return asked
    found = get_last_checkpoint(arguments.output_dir)
    if found is None:
        raise ValueError(f"--resume_from_checkpoint: {arguments.output_dir} has no checkpoint; drop the flag")
    return found


def adapter_state(model: PeftModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is trained, in the base model's dtype, to which every pass rounds it anyway.

    Every process must ask, since FSDP leaves each a shard.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    return {name: tensor.to(dtype) for name, tensor in whole.items()}
