# SPDX-License-Identifier: Apache-2.0
"""No speed without a green gate: vLLM's answers against Hugging Face, with PEFT and `vllm_parade.tuner`, in float32.

Every answered token goes through the reference once, after the tokens before it. In float32 it must be the reference's
most likely one, and its log-probability the reference's. In bfloat16 the engine's own tokens are judged: how far its
log-probabilities are off, for the base model and for each adapter, on the same prompts.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import END, MARK, prepare_environment, results_of
from benchmarks.models import make_random_llama, make_random_parade
from benchmarks.report import save, tables

TOLERANCE = 1e-3
# In bfloat16 an adapter's rows may be this many times as far off as the base model's.
BFLOAT16_BOUND = 1.5
# An adapter must change log-probabilities by this much on average, else equality would show nothing.
ENOUGH = 20 * TOLERANCE
NUM_ADAPTERS = 3
ANSWER = 12
TINY_LENGTHS = [1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 47, 64, 65, 89, 100, 127, 128, 144, 200, 233, 256, 300]
LENGTHS = sorted({*TINY_LENGTHS, *range(20, 701, 28)})[:48]
"""Of prompts for a real model."""


def run_tiny(folder: Path, engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a tiny random model in float32, every prompt under the next adapter or none."""
    shape = make_random_llama(folder / "tiny_llama")
    users: list[str | None] = [None]
    for number in range(NUM_ADAPTERS):
        path = folder / f"tiny_llama_random{number}"
        users.append(make_random_parade(path, shape, number, torch.float32, up=0.25, inner=0.2))
    asked = [(length, users[number % len(users)]) for number, length in enumerate(TINY_LENGTHS)]
    options = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 512, **engine}
    return compare(str(folder / "tiny_llama"), asked, "float32", options)


def run_model(
    model: str, folder: Path, adapters: Sequence[str], dtypes: Sequence[str], engine: dict[str, Any]
) -> list[dict[str, Any]]:
    """Compare a real model, every prompt with the base model and with every adapter."""
    from transformers import AutoConfig

    from vllm_parade.adapter import BaseModelShape

    shape = BaseModelShape.from_hf_config(AutoConfig.from_pretrained(model))
    # In bfloat16, so that loading rounds nothing: the base model's weights are not rounded by loading either.
    names = adapters or [
        make_random_parade(folder / f"random{n}", shape, n, torch.bfloat16, up=0.25) for n in range(NUM_ADAPTERS)
    ]
    asked = [(length, user) for length in LENGTHS for user in (None, *names)]
    options = {"kv_cache_memory_bytes": 2 << 30, "max_model_len": 1024, **engine}
    return [record for dtype in dtypes for record in compare(model, asked, dtype, options)]


def compare(
    model: str, asked: Sequence[tuple[int, str | None]], dtype: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Ask an engine, then the reference; a record for the base model and one for each adapter."""
    outputs = _answers(model, asked, dtype, options)
    reference, records = Reference(model), []
    for adapter in sorted({adapter or "" for _, adapter in asked}):
        mine = [output for output, (_, other) in zip(outputs, asked, strict=True) if (other or "") == adapter]
        with reference.logprobs("") as logprobs:
            unadapted = [logprobs(prompt, answer)[1] for prompt, answer, _ in mine]
        differences, effects, wrong = [], [], 0
        with reference.logprobs(adapter) as logprobs:
            for (prompt, answer, served), base in zip(mine, unadapted, strict=True):
                likeliest, values = logprobs(prompt, answer)
                wrong += sum(a != b for a, b in zip(answer, likeliest, strict=True))
                differences.append((torch.tensor(served) - values).abs())
                effects.append((base - values).abs())
        every = torch.cat(differences)
        records.append(
            {
                "workload": "exactness",
                "variant": Path(adapter).name or "base",
                "dtype": dtype,
                "model": Path(model).name,
                "requests": len(mine),
                "tokens": len(every),
                "different_tokens": wrong,
                "max_difference": every.max().item(),
                "mean_difference": every.mean().item(),
                # How far the adapter itself moves them.
                "mean_effect": torch.cat(effects).mean().item(),
            }
        )
    return records


def _answers(
    model: str, asked: Sequence[tuple[int, str | None]], dtype: str, options: dict[str, Any]
) -> list[tuple[list[int], list[int], list[float]]]:
    """Prompt, answer and its log-probabilities for every request; the engine is gone afterwards."""
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    from vllm_parade import ParadeRequest

    vocab = AutoConfig.from_pretrained(model).vocab_size
    prompts = {length: random.Random(length).choices(range(vocab // 10, vocab), k=length) for length, _ in asked}
    adapters = {adapter for _, adapter in asked if adapter}
    llm = LLM(model, dtype=dtype, enable_parade=True, max_parades=max(len(adapters), 1), **options)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=1, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[length]} for length, _ in asked],
        params,
        parade_request=[ParadeRequest(Path(adapter).name, adapter) if adapter else None for _, adapter in asked],
        use_tqdm=False,
    )
    llm.llm_engine.engine_core.shutdown()
    answers = []
    for output in outputs:
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        values = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
        answers.append((list(output.prompt_token_ids), tokens, values))
    return answers


class Reference:
    """The model in float32, without any shortcut in its multiplications."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(self.device)

    @contextmanager
    def logprobs(self, adapter: str) -> Iterator[Any]:
        """A function from prompt and answer to the likeliest tokens and the log-probabilities of the answer's."""
        from peft import PeftModel

        import vllm_parade.tuner  # noqa: F401  teaches PEFT the method

        model: Any = PeftModel.from_pretrained(self.base, adapter) if adapter else self.base

        @torch.no_grad()
        def logprobs(prompt: list[int], answer: list[int]) -> tuple[list[int], torch.Tensor]:
            ids = torch.tensor([prompt + answer[:-1]], device=self.device)
            mask = (torch.arange(ids.shape[1], device=self.device) < len(prompt)).long()[None]
            options = {"instruction_mask": mask} if adapter else {}
            logits = model(input_ids=ids, **options).logits[0, len(prompt) - 1 :]
            values = logits.log_softmax(-1).gather(1, torch.tensor(answer, device=self.device)[:, None])
            return logits.argmax(-1).tolist(), values[:, 0].cpu()

        try:
            yield logprobs
        finally:
            if adapter:
                model.unload()


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the figures, in words; nothing where the gate is green."""
    found = [
        f"{record['variant']} changes log-probabilities by {record['mean_effect']:.2e} only, too little to tell"
        for record in records
        if record["variant"] != "base" and record["mean_effect"] < ENOUGH
    ]
    for record in records:
        if record["dtype"] == "float32" and (record["different_tokens"] or record["max_difference"] > TOLERANCE):
            found.append(
                f"float32, {record['model']}, {record['variant']}: {record['different_tokens']} of {record['tokens']} "
                f"tokens differ, log-probabilities by up to {record['max_difference']:.2e} (bound {TOLERANCE})"
            )
    for name, ratios in bfloat16_ratios(records).items():
        found += [
            f"bfloat16, {name}: {measure} is {value:.2f} times that of the base model (bound {BFLOAT16_BOUND})"
            for measure, value in ratios.items()
            if value > BFLOAT16_BOUND
        ]
    return found


def bfloat16_ratios(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as far off every adapter's rows are as the base model's, by largest difference and by mean."""
    rows = {record["variant"]: record for record in records if record["dtype"] == "bfloat16"}
    base = rows.pop("base", None)
    if base is None:
        return {}
    measures = ("max_difference", "mean_difference")
    return {name: {measure: row[measure] / base[measure] for measure in measures} for name, row in rows.items()}


def gate(folder: Path, engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a tiny model in a process of its own, which takes its device memory along when it ends.

    Raises:
        SystemExit: an answer is wrong.
    """
    command = [sys.executable, "-m", "benchmarks", "exactness", "--folder", str(folder), "--engine", json.dumps(engine)]
    return results_of(command)


def main(args: argparse.Namespace) -> None:
    """The subcommand: a tiny random model, or the real one of --model."""
    # vLLM's attention kernel for float32 would round to TF32.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    prepare_environment()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.model:
        records = run_model(args.model, args.folder, args.adapters, args.dtypes, args.engine)
    else:
        records = run_tiny(args.folder, args.engine)
    for record in records:
        print(MARK + json.dumps(record), flush=True)
    print(tables(records))
    for name, ratios in bfloat16_ratios(records).items():
        print(f"bfloat16, {name} / base: " + ", ".join(f"{measure} {value:.3f}" for measure, value in ratios.items()))
    save(args.out, vars(args), records)
    found = failures(records)
    if found:
        raise SystemExit("benchmarks: not exact\n" + "\n".join(found))
    print(END, flush=True)
