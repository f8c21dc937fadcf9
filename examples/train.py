# SPDX-License-Identifier: Apache-2.0
"""Train a PARADE adapter on real data and write it, with a model card, to a folder that the server loads.

    python examples/train.py --task sst2 --data FOLDER --output adapters/sst2

FOLDER holds the task's files: train.tsv, dev.tsv and test.tsv of SST-2 (`sentence<TAB>label`), or devset.csv and
testset_w_refs.csv of the E2E NLG challenge. Several values of --lr or --generator-input are tried one after another;
the adapter of the lowest dev loss is kept. What the card reports is measured on the adapter as saved, loaded again.
"""

import argparse
import itertools
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_parade.adapter.config import GENERATOR_INPUTS, AdapterConfig
from vllm_parade.train.data import encode
from vllm_parade.train.tasks import TASKS, Example, Splits, Task
from vllm_parade.train.trainer import TrainSettings, answer, choose, train
from vllm_parade.tuner import ParadeModel


@dataclass(frozen=True)
class Trial:
    """One setting, and the dev loss that it reached."""

    config: AdapterConfig
    settings: TrainSettings
    dev_loss: float
    step: int


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a PARADE adapter.")
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--model", help="base model, folder or name; default: SmolLM2-135M-Instruct, built if missing")
    parser.add_argument("--base-name", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="its name for the config")
    parser.add_argument("--steps", type=int, default=TrainSettings.steps)
    parser.add_argument("--batch-size", type=int, default=TrainSettings.batch_size)
    parser.add_argument("--lr", type=float, nargs="+", default=[TrainSettings.lr])
    parser.add_argument("--generator-input", choices=GENERATOR_INPUTS, nargs="+", default=["layer_input"])
    parser.add_argument("--r", type=int, default=AdapterConfig.r, help="bottleneck size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--eval-every", type=int, default=TrainSettings.eval_every, help="steps")
    parser.add_argument("--eval-rows", type=int, help="examples of dev and of test to use; default: all")
    return parser.parse_args()


def load_base(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.model is None:
        from base_model import base_model

        args.model = str(base_model())
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    return model.to(args.device), transformers.AutoTokenizer.from_pretrained(args.model)


def try_settings(args: argparse.Namespace, base: Any, tokenizer: Any, splits: Splits) -> list[Trial]:
    """Train once for each combination; the best adapter so far is the one in `args.output`. Best trial first."""
    pairs, dev = encode(tokenizer, splits.train), encode(tokenizer, splits.dev)
    trials: list[Trial] = []
    for lr, generator_input in itertools.product(args.lr, args.generator_input):
        config = AdapterConfig(args.base_name, "CAUSAL_LM", r=args.r, generator_input=generator_input)
        settings = TrainSettings(args.steps, args.batch_size, lr, eval_every=args.eval_every, seed=args.seed)
        print(f"training on {len(pairs)} pairs: lr {lr}, {generator_input}", flush=True)
        model = ParadeModel(base, config, seed=args.seed)
        trial = Trial(config, settings, *train(model, pairs, dev, settings, tokenizer.pad_token_id))
        if all(trial.dev_loss < other.dev_loss for other in trials):
            model.save_pretrained(args.output, torch.bfloat16)
        model.unload()
        trials.append(trial)
    return sorted(trials, key=lambda trial: trial.dev_loss)


def score(task: Task, model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Scores of greedy answers and, where the possible answers are few, of the likeliest of them."""
    prompts = [example.prompt for example in examples]
    answers = answer(model, tokenizer, prompts, task.max_new_tokens)
    scores = {"greedy": task.metric(answers, examples)}
    if task.choices:
        scores["likeliest"] = task.metric(choose(model, tokenizer, prompts, task.choices), examples)
    print(f"{scores}; for example: {answers[0]!r}", flush=True)
    return scores


def score_splits(task: Task, model: Any, tokenizer: Any, splits: Splits) -> dict[str, dict[str, float]]:
    return {name: score(task, model, tokenizer, getattr(splits, name)) for name in ("dev", "test")}


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    python, torch_version = platform.python_version(), torch.__version__
    return f"{name}, Python {python}, PyTorch {torch_version}, Transformers {transformers.__version__}"


def source(folder: Path, keys: Sequence[str]) -> str:
    """The lines of the folder's SOURCE.txt that begin with one of `keys`, as a list."""
    path = folder / "SOURCE.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["the folder has no SOURCE.txt"]
    return "\n".join(f"- {line}" for line in lines if not path.is_file() or line.startswith(tuple(keys)))


def write_card(args: argparse.Namespace, task: Task, splits: Splits, trials: list[Trial], rows: list[str]) -> None:
    best = trials[0]
    tried = [f"lr {t.settings.lr}, {t.config.generator_input}: {t.dev_loss:.4f} at step {t.step}" for t in trials]
    ways = f"Greedy: of the greedy answer's first {task.max_new_tokens} tokens."
    if task.choices:
        ways += f"\nLikeliest: of the answer out of {', '.join(task.choices)} whose first token has the largest logit."
    sizes = f"train {sum(len(e.responses) for e in splits.train)} pairs of {len(splits.train)} prompts"
    card = f"""---
base_model: {args.base_name}
library_name: vllm-parade
tags: [parade, {task.name}]
---
# A PARADE adapter for {task.name}

Trained by `examples/train.py` of vllm-parade. It answers well only to the wording it was trained on:
`vllm_parade.train.templates.{task.name}_prompt` as the only user message.

## Measured
{task.metric_name}, in per cent; the adapter as saved (bfloat16) and loaded again, the base model in {args.dtype},
both with Transformers. {ways}

| split | examples | way | base model | adapter |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Machine: {machine(torch.device(args.device))}, {time.strftime("%Y-%m-%d")}.

## Training
- {sizes}; dev {len(splits.dev)} and test {len(splits.test)} prompts
- adapter: {best.config.to_dict()}
- settings: {asdict(best.settings)}; AdamW without weight decay, gradient norm clipped at 1
- dev loss of each setting tried, the best is kept: {"; ".join(tried)}

## Base model
{source(Path(args.model), ("model", "taken from", "weights", "made by"))}

## Data
{source(args.data, ("data set", "licence as stated"))}
"""
    (args.output / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    args = parse_args()
    task = TASKS[args.task]
    splits = task.load(args.data)
    splits = Splits(splits.train, splits.dev[: args.eval_rows], splits.test[: args.eval_rows])
    base, tokenizer = load_base(args)
    before = score_splits(task, base, tokenizer, splits)
    trials = try_settings(args, base, tokenizer, splits)
    after = score_splits(task, ParadeModel.from_pretrained(base, args.output), tokenizer, splits)
    rows = [
        f"| {split} | {len(getattr(splits, split))} | {way} | {before[split][way]:.1f} | {after[split][way]:.1f} |"
        for split in before
        for way in before[split]
    ]
    write_card(args, task, splits, trials, rows)
    print("\n".join(rows), f"adapter written to {args.output}", sep="\n")


if __name__ == "__main__":
    main()
