# SPDX-License-Identifier: Apache-2.0
"""Step times of running requests while a long prompt is computed.

Run it with the chunk size of interest, e.g. `--engine '{"max_num_batched_tokens": 2048}'`.
"""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.engine import Variant
from benchmarks.report import Record
from benchmarks.samples import Measured, spread

# Decode steps before the prompt arrives.
QUIET_STEPS = 20
# More than the steps of any round. The requests are aborted at the end of a round.
MANY_TOKENS = 1000


class Round(NamedTuple):
    """Times in one round, in seconds. One long prompt arrives per round."""

    quiet: list[float]
    """Steps of the running requests before the prompt arrives."""
    steps: list[float]
    """Their steps from the arrival until the prompt has its first token."""
    ttft: float | None
    """The prompt's time to first token; None if it was refused."""


def beside(measured: Measured) -> Iterator[Record]:
    """Steps of base-model requests while a long prompt arrives: a document, then a question.

    `unused` is a base-model prompt in a PARADE engine. With an adapter that reads the whole prompt (`parade-whole`),
    the prompt must be refused.
    """
    variant, sizes = measured.variant, measured.points
    users: dict[str, Any] = {variant.name: variant.few[0] if variant.few else None}
    if variant.name == "parade":
        users = {"unused": None, **users, "parade-whole": variant.adapters[0]}
    rounds: dict[str, list[Round]] = {name: [] for name in users}
    for number in range(variant.settings.repeats + 1):
        with variant.turn():
            for name, adapter in users.items():
                prompt = [*variant.words(max(sizes.documents)), *variant.message(sizes.question)]
                found = arrival(variant, sizes.beside, sizes.length, prompt, adapter)
                # The first round is a warm-up.
                rounds[name] += [found] if number else []
    for name, mine in rounds.items():
        yield _record(measured, name, mine)


def _record(measured: Measured, name: str, rounds: list[Round]) -> Record:
    sizes = measured.points
    record: Record = {
        "workload": "beside",
        "variant": name,
        "running": sizes.beside,
        "prompt": max(sizes.documents) + sizes.question,
        "step_tokens": measured.variant.step_tokens(),
        "served": all(one.ttft is not None for one in rounds),
        **spread([step for one in rounds for step in one.quiet], "quiet"),
    }
    if not record["served"]:
        return record
    return {
        **record,
        **spread([max(one.steps) for one in rounds], "longest"),
        **spread([step for one in rounds for step in one.steps], "step"),
        **spread([one.ttft for one in rounds if one.ttft is not None], "ttft"),
        "steps": statistics.median(len(one.steps) for one in rounds),
    }


def arrival(variant: Variant, running: int, length: int, prompt: list[int], adapter: Any) -> Round:
    """Let base-model requests decode, add a prompt under an adapter, and time the running requests' steps."""
    from vllm.exceptions import VLLMValidationError

    steps = Steps(variant.llm.llm_engine)
    others = [steps.add(tokens["prompt_token_ids"], MANY_TOKENS) for tokens in variant.prompts(running, length)]
    while len(steps.last) < running:
        steps.step()
    quiet = [steps.step() for _ in range(QUIET_STEPS)]
    beside, ttft = [], None
    try:
        long = steps.add(prompt, 1, adapter)
    except VLLMValidationError:
        pass
    else:
        while long not in steps.last:
            beside.append(steps.step())
        ttft = steps.last[long].first_token_latency
    steps.end(others)
    return Round(quiet, beside, ttft)


class Steps:
    """Drives an engine step by step. Steps are timed by the engine core's clock."""

    requests = 0
    """Number of requests so far, used in their names."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.last: dict[str, Any] = {}
        """vLLM's metrics of each request that has a token."""

    def add(self, prompt: list[int], tokens: int, adapter: Any = None) -> str:
        """Add a greedy request for exactly `tokens` tokens; returns its name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        Steps.requests += 1
        name = f"beside{Steps.requests}"
        delta = RequestOutputKind.DELTA
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=delta)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=adapter)
        return name

    def step(self) -> float:
        """Run until requests get tokens. Returns the longest time between a request's previous token and this one."""
        before = {name: metrics.last_token_ts for name, metrics in self.last.items()}
        outputs: list[Any] = []
        while not outputs:
            outputs = [output for output in self.engine.step() if output.outputs[0].token_ids]
        self.last |= {output.request_id: output.metrics for output in outputs}
        names = [output.request_id for output in outputs if output.request_id in before]
        return max((self.last[name].last_token_ts - before[name] for name in names), default=0.0)

    def end(self, names: list[str]) -> None:
        """Abort requests, and wait until the engine is idle."""
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
