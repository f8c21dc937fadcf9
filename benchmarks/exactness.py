# SPDX-License-Identifier: Apache-2.0
"""The gate before any timing: compares vLLM's answers with the float32 oracle (`testing/oracle.py`).

The oracle computes the log-probability of every answered token, given the tokens before it. In float32, the token must
be the oracle's most likely one, and the log-probabilities must agree. In bfloat16, only the errors of the engine's
log-probabilities count: those of each adapter are compared with those of the base model on the same prompts.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import END, MARK, prepare_environment, results_of
from benchmarks.report import save, tables
from testing.oracle import ENOUGH, TOLERANCE, Oracle, answered, by_request
from testing.random_models import INNER, make_adapter, make_tiny_model
from vllm_parade import ParadeRequest

# Bound for the ratio of an adapter's error in bfloat16 to the base model's.
BFLOAT16_BOUND = 1.5
NUM_ADAPTERS = 3
ANSWER = 12
TINY_LENGTHS = [1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 47, 64, 65, 89, 100, 127, 128, 144, 200, 233, 256, 300]
LENGTHS = sorted({*TINY_LENGTHS, *range(20, 701, 28)})[:48]
"""Lengths of prompts for a real model."""
# Every prompt has turns of so many tokens, each with an instruction of a third of them, after two base tokens.
TURN_TOKENS = 48


class Question(NamedTuple):
    """A prompt under an adapter or the base model."""

    tokens: list[int]
    request: ParadeRequest | None
    then: Sequence[int] = ()
    """Message sent next, behind prompt and answer, which are cached by then; empty for none."""


def run_tiny(folder: Path, engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a tiny random model in float32. The prompts take the base model and the adapters in turn."""
    shape = make_tiny_model(folder / "tiny_llama")
    users: list[ParadeRequest | None] = [None]
    users += [make_adapter(folder / f"tiny_llama_random{n}", shape, n, inner=INNER) for n in range(NUM_ADAPTERS)]
    markers = turn_markers(str(folder / "tiny_llama"))
    turns = make_adapter(folder / "tiny_llama_turns", shape, NUM_ADAPTERS, inner=INNER, **markers)
    users.append(turns)
    model = str(folder / "tiny_llama")
    pairs = [(length, users[number % len(users)]) for number, length in enumerate(TINY_LENGTHS)]
    options = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 512, **engine}
    return compare(model, _questions(model, pairs, turns), "float32", options)


def run_model(
    model: str, folder: Path, adapters: Sequence[str], dtypes: Sequence[str], engine: dict[str, Any]
) -> list[dict[str, Any]]:
    """Compare a real model: each prompt with the base model and with each adapter."""
    from transformers import AutoConfig

    from vllm_parade.adapter import BaseModelShape

    shape = BaseModelShape.from_hf_config(AutoConfig.from_pretrained(model))
    # In bfloat16, so that loading does not round the adapters; it does not round the base model's weights either.
    requests = [ParadeRequest(Path(path).name, path) for path in adapters] or [
        make_adapter(folder / f"random{n}", shape, n, dtype=torch.bfloat16) for n in range(NUM_ADAPTERS)
    ]
    markers = turn_markers(model)
    turns = make_adapter(folder / "turns", shape, NUM_ADAPTERS, dtype=torch.bfloat16, **markers)
    pairs = [(length, user) for length in LENGTHS for user in (None, *requests, turns)]
    asked = _questions(model, pairs, turns)
    options = {"kv_cache_memory_bytes": 2 << 30, "max_model_len": 1024, **engine}
    return [record for dtype in dtypes for record in compare(model, asked, dtype, options)]


def _questions(model: str, pairs: Sequence[tuple[int, ParadeRequest | None]], turns: ParadeRequest) -> list[Question]:
    """Prompts of these lengths. Those under the adapter that marks its turns are continued with another message."""
    start, end = turn_markers(model).values()
    # A prompt of eight tokens is too short for turns.
    message = [*start, *_prompt(model, 8), *end]
    return [Question(_prompt(model, length), request, message if request is turns else ()) for length, request in pairs]


def compare(model: str, asked: Sequence[Question], dtype: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare an engine's answers with the oracle; returns a record for the base model and one per adapter."""
    outputs, requests = _answers(model, asked, dtype, options)
    oracle = Oracle(model, "cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for request, mine in by_request(outputs, requests):
        record = {"workload": "exactness", "variant": request.parade_name if request else "base"}
        records.append({**record, "dtype": dtype, "model": Path(model).name, **_differences(oracle, request, mine)})
    return records


def _differences(oracle: Oracle, request: ParadeRequest | None, outputs: Sequence[Any]) -> dict[str, Any]:
    """Differences between an engine's outputs under one adapter and the oracle's."""
    with oracle.logprobs(None) as logprobs:
        plain = torch.cat([logprobs(output)[1] for output in outputs])
    with oracle.logprobs(request) as logprobs:
        likeliest, values = zip(*map(logprobs, outputs), strict=True)
    answers, served = zip(*map(answered, outputs), strict=True)
    wanted = torch.cat(values)
    differences = (torch.cat(served) - wanted).abs()
    return {
        "requests": len(outputs),
        "tokens": len(differences),
        "different_tokens": sum(a != b for a, b in zip(chain(*answers), chain(*likeliest), strict=True)),
        "max_difference": differences.max().item(),
        "mean_difference": differences.mean().item(),
        # How much the adapter changes the oracle's log-probabilities.
        "mean_effect": (plain - wanted).abs().mean().item(),
    }


def turn_markers(model: str) -> dict[str, Any]:
    """Settings of an adapter that marks the turns of the gate's prompts."""
    last = _vocabulary(model) - 1
    return {"instruction_start_tokens": (last, last - 1), "instruction_end_tokens": (last - 2,)}


def _vocabulary(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).vocab_size)


def _prompt(model: str, length: int) -> list[int]:
    """A random prompt with turns."""
    vocabulary = _vocabulary(model)
    tokens = random.Random(length).choices(range(vocabulary // 10, vocabulary - 3), k=length)
    start, end = turn_markers(model).values()
    for turn in range(2, length - TURN_TOKENS // 3, TURN_TOKENS):
        tokens[turn : turn + len(start)] = start
        tokens[turn + TURN_TOKENS // 3] = end[0]
    return tokens


def _answers(
    model: str, asked: Sequence[Question], dtype: str, options: dict[str, Any]
) -> tuple[list[Any], list[ParadeRequest | None]]:
    """An engine's outputs for all questions, then for their next messages, with their requests.

    Shuts the engine down.
    """
    from vllm import LLM, SamplingParams

    adapters = {question.request.path for question in asked if question.request}
    llm = LLM(model, dtype=dtype, enable_parade=True, max_parades=max(len(adapters), 1), **options)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=1, detokenize=False)

    def generate(questions: Sequence[Question]) -> list[Any]:
        prompts = [{"prompt_token_ids": question.tokens} for question in questions]
        requests = [question.request for question in questions]
        return llm.generate(prompts, params, parade_request=requests, use_tqdm=False)

    outputs = generate(asked)
    later = [
        Question([*question.tokens, *output.outputs[0].token_ids, *question.then], question.request)
        for question, output in zip(asked, outputs, strict=True)
        if question.then
    ]
    outputs += generate(later) if later else []
    llm.llm_engine.engine_core.shutdown()
    return outputs, [question.request for question in (*asked, *later)]


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Messages about failed comparisons; empty if the gate passes."""
    found = [
        f"{record['variant']} changes log-probabilities by {record['mean_effect']:.2e}, too little for a comparison"
        for record in records
        if record["variant"] != "base" and record["mean_effect"] < ENOUGH
    ]
    for record in records:
        if record["dtype"] == "float32" and (record["different_tokens"] or record["max_difference"] > TOLERANCE):
            found.append(
                f"float32, {record['model']}, {record['variant']}: {record['different_tokens']} of {record['tokens']} "
                f"tokens differ, log-probabilities differ by up to {record['max_difference']:.2e} (bound {TOLERANCE})"
            )
    for name, ratios in bfloat16_ratios(records).items():
        found += [
            f"bfloat16, {name}: {measure} is {value:.2f} times that of the base model (bound {BFLOAT16_BOUND})"
            for measure, value in ratios.items()
            if value > BFLOAT16_BOUND
        ]
    return found


def bfloat16_ratios(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ratio of each adapter's bfloat16 error to the base model's, for the largest and the mean difference."""
    rows = {record["variant"]: record for record in records if record["dtype"] == "bfloat16"}
    base = rows.pop("base", None)
    if base is None:
        return {}
    measures = ("max_difference", "mean_difference")
    return {name: {measure: row[measure] / base[measure] for measure in measures} for name, row in rows.items()}


def gate(folder: Path, engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a tiny model in a separate process, so that its device memory is freed when it exits.

    Raises:
        SystemExit: an answer is wrong.
    """
    command = [sys.executable, "-m", "benchmarks", "exactness", "--folder", str(folder), "--engine", json.dumps(engine)]
    return results_of(command)


def main(args: argparse.Namespace) -> None:
    """Run the subcommand on a tiny random model, or on the model of --model."""
    # By default, vLLM's float32 attention kernel rounds to TF32.
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
