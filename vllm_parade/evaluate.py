# SPDX-License-Identifier: Apache-2.0
"""Score adapters and their base model on a task, served together by vLLM.

    python -m vllm_parade.evaluate --model MODEL --task sst2 --data FOLDER --adapter mine=adapters/sst2

Base model and all adapters answer in one batch. The adapters are PARADE's or LoRA's. For tasks with a few possible
answers, the most likely one counts. For other tasks, the greedy answer counts, or the best of a beam search
(--num_beams 3, as in the paper).
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_parade.adapter import AdapterError, load_adapter
from vllm_parade.config import ServingConfigError
from vllm_parade.train.command import check_output_folder, naming, one_line_errors, require_modules
from vllm_parade.train.data import encode_prompt
from vllm_parade.train.pretrained import check_model, check_template, unusable
from vllm_parade.train.readers import read_text
from vllm_parade.train.tasks import TASKS, Example, Task, check_metric, read_task
from vllm_parade.train.templates import TEMPLATES

BASE = "base model"
# Values that vLLM accepts as max_lora_rank.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(
        prog="python -m vllm_parade.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", required=True, help="base model, a folder or a name on the Hub")
    top.add_argument("--task", required=True, choices=sorted(TASKS))
    top.add_argument("--data", required=True, type=Path, help="folder of the task's files")
    top.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        type=_named,
        metavar="NAME=PATH",
        help="names and folders of adapters, all PARADE or all LoRA",
    )
    top.add_argument("--split", default="test", choices=("dev", "test"), help="default: %(default)s")
    top.add_argument("--rows", type=int, help="number of examples, from the start of the split; default: all")
    top.add_argument("--template", default="chat", choices=sorted(TEMPLATES), help="the template used in training")
    top.add_argument("--num_beams", type=int, default=1, help="beam width; default: %(default)s, greedy")
    top.add_argument("--engine", type=_options, default={}, help="further engine arguments, as JSON")
    top.add_argument("--output", type=Path, help="JSON file for scores and answers")
    return top


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not (Path(path) / "adapter_config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH with the folder of an adapter")
    return name, path


def _options(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: invalid JSON: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object that maps argument names to values")
    return values


def _settings(path: str) -> dict[str, Any]:
    """Read adapter_config.json of an adapter, for any PEFT type."""
    file = Path(path) / "adapter_config.json"
    with naming("--adapter"):
        try:
            values = json.loads(read_text(file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: invalid JSON: {error}; expected PEFT's config of an adapter") from error
        if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
            raise ValueError(f"{file}: has no peft_type; expected PEFT's config of an adapter")
        if not isinstance(values.get("r", 1), int):
            raise ValueError(f"{file}: r is {values['r']!r}; expected a whole number")
        return values


def adapter_kind(adapters: Sequence[tuple[str, str]]) -> str:
    """The PEFT type of the adapters, PARADE or LORA; PARADE without adapters.

    Raises:
        ValueError: vLLM does not serve the type, or the adapters have several types.
    """
    kinds = {_settings(path)["peft_type"] for _, path in adapters}
    if len(kinds) > 1:
        raise ValueError(f"--adapter names adapters of the types {', '.join(sorted(kinds))}; give adapters of one type")
    kind = kinds.pop() if kinds else "PARADE"
    if kind not in ("PARADE", "LORA"):
        raise ValueError(
            f"--adapter names an adapter of type {kind}, which vLLM does not serve; expected PARADE or LORA"
        )
    return kind


def check_adapters(adapters: Sequence[tuple[str, str]]) -> None:
    """Refuse adapters before the base model is loaded; vLLM would refuse them only afterwards.

    Raises:
        ValueError: names the adapter, the reason and the remedy.
    """
    names = [name for name, _ in adapters]
    for name in names:
        if name == BASE or names.count(name) > 1:
            raise ValueError(f"--adapter: the name {name!r} is already taken; give each adapter its own name")
    if adapter_kind(adapters) == "PARADE":
        for _, path in adapters:
            with naming("--adapter"):
                load_adapter(path)
    elif _largest(adapters, 8) > LORA_RANKS[-1]:
        raise ValueError(f"--adapter names a LoRA of r {_largest(adapters, 8)}; vLLM serves at most {LORA_RANKS[-1]}")


class Server:
    """An engine that serves the base model and the adapters."""

    def __init__(self, model: str, adapters: Sequence[tuple[str, str]], engine: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        from vllm_parade import ParadeRequest

        self.kind, count = adapter_kind(adapters), max(len(adapters), 1)
        self.requests: dict[str, Any] = {BASE: None}
        options: dict[str, Any]
        if self.kind == "PARADE":
            options = {"enable_parade": True, "max_parades": count, "max_parade_rank": _largest(adapters, 16)}
            # The engine checks these before it loads the base model.
            options["parade_modules"] = [{"name": name, "path": path} for name, path in adapters]
            self.requests |= {name: ParadeRequest(name, path) for name, path in adapters}
        else:
            options = {"enable_lora": True, "max_loras": count, "max_lora_rank": _lora_rank(_largest(adapters, 8))}
            self.requests |= {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(adapters)}
        with _refusals(model, engine):
            self.llm = LLM(model, **{**options, **engine})
        self.tokenizer = self.llm.get_tokenizer()

    def answers(self, task: Task, examples: Sequence[Example], template: str, num_beams: int) -> dict[str, list[str]]:
        """Answers to all examples, by the name of the adapter or `BASE`."""
        prompts = [{"prompt_token_ids": encode_prompt(self.tokenizer, e.prompt, template)} for e in examples]
        asked = [(prompt, request) for request in self.requests.values() for prompt in prompts]
        texts = self._ask([prompt for prompt, _ in asked], [request for _, request in asked], task, num_beams)
        parts = (texts[start : start + len(prompts)] for start in range(0, len(texts), len(prompts)))
        return dict(zip(self.requests, parts, strict=True))

    def _ask(self, prompts: list[Any], requests: list[Any], task: Task, num_beams: int) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import BeamSearchParams

        chosen = {"parade_request" if self.kind == "PARADE" else "lora_request": requests}
        if task.choices:
            first = [self.tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in task.choices]
            params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=first)
            outputs = self.llm.generate(prompts, params, **chosen)
            return [task.choices[first.index(output.outputs[0].token_ids[0])] for output in outputs]
        if num_beams == 1:
            outputs = self.llm.generate(
                prompts, SamplingParams(temperature=0, max_tokens=task.max_new_tokens), **chosen
            )
            return [output.outputs[0].text.strip() for output in outputs]
        beams = self.llm.beam_search(prompts, BeamSearchParams(num_beams, task.max_new_tokens), **chosen)
        # A beam's tokens begin with the prompt.
        return [
            self.tokenizer.decode(
                beam.sequences[0].tokens[len(prompt["prompt_token_ids"]) :], skip_special_tokens=True
            ).strip()
            for prompt, beam in zip(prompts, beams, strict=True)
        ]


@contextmanager
def _refusals(model: str, engine: dict[str, Any]) -> Iterator[None]:
    """Turn errors of the engine's startup into a ValueError that names the flags."""
    try:
        yield
    except AdapterError as error:
        raise ValueError(f"--adapter {error}") from error
    except ServingConfigError:
        # The message names the option already.
        raise
    except (OSError, TypeError, ValueError) as error:
        # Any other TypeError is a bug, not bad input.
        if isinstance(error, TypeError) and "unexpected keyword argument" not in str(error):
            raise
        if isinstance(error, OSError) and not Path(model).exists():
            raise unusable(model, error) from error
        raise ValueError(f"vLLM refuses --model {model} with --engine {json.dumps(engine)}: {error}") from error


def _largest(adapters: Sequence[tuple[str, str]], least: int) -> int:
    # PEFT always writes r. The default covers files that were written by hand.
    ranks = (_settings(path).get("r", least) for _, path in adapters)
    return max([least, *ranks])


def _lora_rank(rank: int) -> int:
    return next(size for size in LORA_RANKS if size >= rank)


def check(args: argparse.Namespace) -> list[Example]:
    """Check all input before an engine starts, and return the examples to answer.

    Raises:
        ValueError: names the flag, its value and the remedy.
    """
    for name, value in (("rows", args.rows), ("num_beams", args.num_beams)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected 1 or more")
    check_model(args.model)
    check_adapters(args.adapter)
    check_metric(args.task)
    examples = getattr(read_task(args.task, args.data, args.split), args.split)[: args.rows]
    require_modules("vllm", remedy="pip install 'vllm-parade[cuda]' or 'vllm-parade[cpu]'")
    _check_template(args)
    if args.output:
        check_output_folder("--output", args.output.parent)
        if args.output.is_dir():
            raise ValueError(f"--output {args.output}: is a folder; give a file")
    return list(examples)


def _check_template(args: argparse.Namespace) -> None:
    """Check the chat template, if vLLM uses Transformers' tokenizer."""
    if args.template != "chat" or {"tokenizer", "tokenizer_mode"} & set(args.engine):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    # vLLM may support a tokenizer that Transformers does not.
    except (OSError, ValueError, KeyError, TypeError):
        return
    check_template(tokenizer, args.template)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of base model and adapters, with their answers."""
    task, examples = TASKS[args.task], check(args)
    server = Server(args.model, args.adapter, args.engine)
    started = time.perf_counter()
    answers = server.answers(task, examples, args.template, args.num_beams)
    return {
        "task": task.name,
        "split": args.split,
        "examples": len(examples),
        "metric": task.metric_name,
        "num_beams": 1 if task.choices else args.num_beams,
        "seconds": time.perf_counter() - started,
        "scores": {name: task.metric(texts, examples) for name, texts in answers.items()},
        "prompts": [example.prompt for example in examples],
        "references": [example.responses for example in examples],
        "answers": answers,
    }


def main() -> None:
    """Run the command."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    args = parser().parse_args()
    with one_line_errors("evaluate"):
        results = evaluate(args)
    head = f"{results['task']}, {results['split']}, {results['examples']} examples"
    print(f"| {head} | {results['metric']} |", "| --- | --- |", sep="\n")
    for name, value in results["scores"].items():
        print(f"| {name} | {value:.1f} |")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
