# SPDX-License-Identifier: Apache-2.0
"""Trains an adapter and saves it, with a Transformers Trainer that also scores answers to dev prompts."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import DataCollatorWithFlattening, EarlyStoppingCallback, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vllm_parade.adapter.turns import TurnMarkers
from vllm_parade.train.answers import score
from vllm_parade.train.arguments import AdapterArguments, PromptTrainingArguments
from vllm_parade.train.card import described, write_card
from vllm_parade.train.command import check_output_folder
from vllm_parade.train.data import Collator, encode
from vllm_parade.train.markers import find_markers
from vllm_parade.train.methods import check_fit, peft_config
from vllm_parade.train.pretrained import load_model, load_model_config, load_tokenizer
from vllm_parade.train.readers import Example, Splits, as_example, read_jsonl
from vllm_parade.train.tasks import TASKS, check_metric, mixture, read_task
from vllm_parade.tuner import ParadeConfig

# Number of training pairs whose prompts --standardize uses.
STANDARD_PAIRS = 256


class PromptTrainer(Trainer):
    """Adds each task's metric to every evaluation, and their mean as `eval_metric`."""

    def __init__(self, *args: Any, options: AdapterArguments, tasks: dict[str, Splits], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options, self.tasks = options, tasks

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Transformers' optimizer, with a separate learning rate for b_up."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in list(optimizer.param_groups) if self.options.bias_lr_ratio != 1 else ():
            biases = [parameter for parameter in group["params"] if names[parameter].endswith(".bias")]
            group["params"] = [parameter for parameter in group["params"] if not names[parameter].endswith(".bias")]
            optimizer.add_param_group({**group, "params": biases, "lr": group["lr"] * self.options.bias_lr_ratio})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Dev loss and, for each trained task, its metric over the first `metric_rows` dev examples."""
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


def load_base(options: AdapterArguments) -> Any:
    """Load the base model."""
    dtype: Any = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model = load_model(options.model, dtype=getattr(torch, dtype), attn_implementation=options.attention)
    model.config.use_cache = False
    return model


def load_data(options: AdapterArguments) -> tuple[Splits, dict[str, Splits]]:
    """All examples, and the examples by task.

    Raises:
        ValueError: names the flag, the file or data set, and the reason.
    """
    if options.task:
        folders = zip(options.task, map(Path, options.data), strict=True)
        tasks = {name: read_task(name, folder, "train", "dev") for name, folder in folders}
        return mixture(list(tasks.values())), tasks
    if options.train_file:
        source = f"--train_file {options.train_file}"
        splits = read_jsonl(Path(options.train_file), Path(options.dev_file) if options.dev_file else None)
    else:
        source, splits = f"--dataset {options.dataset}", _hub_data(str(options.dataset))
    if not splits.train:
        raise ValueError(f"{source}: no training example is left, because all prompts are in dev; add examples")
    return splits, {}


def _hub_data(name: str) -> Splits:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"--dataset {name} needs the package datasets; pip install datasets") from error
    try:
        found = load_dataset(name)
    # datasets raises these for an unknown or ambiguous name.
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset {name}: cannot be loaded: {error}; give a data set's name on the Hub") from error
    if not found.get("train"):
        raise ValueError(
            f"--dataset {name}: has no examples in a split train, only {', '.join(found)}; give another data set"
        )
    parts = {
        split: [as_example(row, f"--dataset {name}, {split} row {number}") for number, row in enumerate(rows)]
        for split, rows in found.items()
    }
    dev = parts.get("validation") or parts.get("dev") or parts["train"][::10][:200]
    return Splits.without_overlap(parts["train"], dev, parts.get("test", []))


def _encode(
    options: AdapterArguments, tokenizer: Any, examples: list[Example], markers: TurnMarkers | None
) -> list[dict[str, list[int]]]:
    pairs = encode(tokenizer, examples, options.template, options.max_length, markers)
    if not pairs:
        raise ValueError(f"--max_length is {options.max_length}, and all {len(examples)} examples are longer; raise it")
    return pairs


def _marked(options: AdapterArguments, config: PeftConfig, tokenizer: Any) -> PeftConfig:
    """The adapter's config, with the chat template's markers if --turns asks for them."""
    if not options.turns:
        return config
    found = find_markers(tokenizer)
    return replace(
        cast(ParadeConfig, config),
        instruction_start_tokens=list(found.start),
        instruction_end_tokens=list(found.end),
        instruction_max_tokens=options.max_instruction_tokens,
    )


def train(options: AdapterArguments, arguments: PromptTrainingArguments) -> dict[str, float]:
    """Train an adapter and save it in `arguments.output_dir`, with a model card.

    Returns:
        metrics of the last evaluation, which uses the best checkpoint
    """
    set_seed(arguments.seed)
    # All checks run before the base model is loaded.
    config, checkpoint = peft_config(options.method, cast(dict, options.peft)), _checkpoint(arguments)
    _check_metrics(options, arguments)
    splits, tasks = load_data(options)
    splits.dev[:] = splits.dev[: options.dev_rows]
    check_fit(config, load_model_config(options.model))
    tokenizer = load_tokenizer(options.model, options.template)
    config = _marked(options, config, tokenizer)
    markers = config.adapter_config().turn_markers if isinstance(config, ParadeConfig) else None
    if markers:
        print(described(markers, tokenizer))
    pairs, dev = (_encode(options, tokenizer, part, markers) for part in (splits.train, splits.dev))
    check_output_folder("--output_dir", Path(arguments.output_dir))
    arguments.batch_for(len(pairs))
    base = load_base(options)
    model = get_peft_model(base, config)
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
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    state = adapter_state(model, base.dtype)
    if trainer.is_world_process_zero():
        trainer.save_state()
        model.save_pretrained(arguments.output_dir, state_dict=state)
        counts = {"training pairs": len(pairs), "dev pairs": len(dev)}
        read = described(markers, tokenizer) if options.method == "parade" else ""
        write_card(Path(arguments.output_dir), options, arguments, trainer.state, metrics, counts, read)
    return metrics


def _check_fsdp(trainer: PromptTrainer) -> None:
    """Refuse options that need unsharded weights."""
    options = trainer.options
    if not trainer.accelerator.is_fsdp2:
        raise ValueError("FSDP 1 cannot mix a bfloat16 base model and a float32 adapter; set fsdp_version to 2")
    if options.standardize:
        raise ValueError("--standardize needs unsharded adapter weights, but FSDP shards them; train with DDP")
    if trainer.tasks and options.metric_rows:
        raise ValueError(
            f"--metric_rows is {options.metric_rows}, but answers need unsharded weights and FSDP shards them; give 0, "
            "and score the adapter with python -m vllm_parade.evaluate"
        )


def _standardize(model: PeftModel, trainer: PromptTrainer, pairs: list[dict[str, list[int]]]) -> None:
    arguments, tokenizer = trainer.args, cast(Any, trainer.processing_class)
    sample = random.Random(arguments.seed).sample(pairs, min(STANDARD_PAIRS, len(pairs)))
    collate, size = Collator(tokenizer.pad_token_id), arguments.per_device_eval_batch_size
    batches = (collate(sample[start : start + size]) for start in range(0, len(sample), size))
    model.base_model.standardize(
        {name: tensor.to(arguments.device) for name, tensor in batch.items()} for batch in batches
    )


def _check_metrics(options: AdapterArguments, arguments: PromptTrainingArguments) -> None:
    """Refuse a metric that the first evaluation could not find or compute."""
    computed = options.task if options.metric_rows else []
    for name in computed:
        check_metric(name)
    wanted = (arguments.metric_for_best_model or "").removeprefix("eval_")
    if wanted in {"metric", *TASKS} and wanted not in {*computed, *(["metric"] if computed else [])}:
        raise ValueError(
            f"--metric_for_best_model is {arguments.metric_for_best_model}, but --task is "
            f"{', '.join(options.task) or 'not given'} and --metric_rows {options.metric_rows}; give eval_loss"
        )


def _checkpoint(arguments: PromptTrainingArguments) -> str | None:
    asked, folder = arguments.resume_from_checkpoint, arguments.output_dir
    if asked in ("true", "True", True):
        found = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if found is None:
            raise ValueError(f"--resume_from_checkpoint: {folder} has no checkpoint; drop the flag")
        return found
    if asked and not Path(asked).is_dir():
        raise ValueError(f"--resume_from_checkpoint {asked}: no such folder; give a checkpoint's folder, or true")
    return asked


def adapter_state(model: PeftModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The trained parameters in the base model's dtype, to which every forward pass rounds them anyway.

    All processes must call this, because gathering FSDP's shards is a collective operation.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    return {name: tensor.to(dtype) for name, tensor in whole.items()}
