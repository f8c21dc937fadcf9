# SPDX-License-Identifier: Apache-2.0
"""The float32 oracle: answers of Transformers and PEFT with `vllm_parade.tuner`, one request at a time.

Tests assert that an engine's answers equal the oracle's. `python -m benchmarks exactness` measures the differences.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft import PeftModel

import vllm_parade.tuner  # noqa: F401  registers the method with PEFT
from vllm_parade import ParadeRequest

TOLERANCE = 1e-3
# If an adapter changes log-probabilities by less than this on average, right answers prove nothing.
ENOUGH = 20 * TOLERANCE

# Applies sampling parameters to the logits of the next token, [vocabulary], given the tokens of the prompt and of the
# answer before it. tests/rules.py defines some.
Rule = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]


class Oracle:
    """Checks engine outputs by running each prompt with its answer through the model once.

    Greedy decoding is correct if every answered token is the most likely one after the tokens before it.

    Args:
        model: folder of the base model
        device: device for the computation; results are on the CPU
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        # On a GPU, TF32 would round the products.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.effective: set[str] = set()
        """Paths of adapters whose effect on log-probabilities is already checked."""
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)

    def check(
        self,
        outputs: list[Any],
        requests: list[ParadeRequest | None],
        rule: Rule | None = None,
        *,
        grammar: bool = False,
    ) -> None:
        """Assert that tokens are equal, and log-probabilities within the bound.

        `rule` applies the sampling parameters of all these requests. vLLM returns log-probabilities from before the
        rule, except for a `grammar`, whose mask comes before the sampler.
        """
        options: dict[str, Any] = {"rule": rule, "grammar": grammar}
        for request, mine in by_request(outputs, requests):
            with self.logprobs(request, **options) as logprobs:
                wanted = [logprobs(output) for output in mine]
            for output, (tokens, values) in zip(mine, wanted, strict=True):
                self._compare(output, request, tokens, values, options)
            if request is not None and request.path not in self.effective:
                with self.logprobs(None, **options) as logprobs:
                    plain = [logprobs(output)[1] for output in mine]
                check_effect(request, torch.cat([values for _, values in wanted]), torch.cat(plain))
                self.effective.add(request.path)

    def check_candidates(self, outputs: list[Any], requests: list[ParadeRequest | None], count: int) -> None:
        """Assert the `count` most likely tokens of every step, and of the prompt's tokens if requested."""
        for request, mine in by_request(outputs, requests):
            with self.logits(request) as logits:
                wanted = [logits(output).log_softmax(-1) for output in mine]
            for output, values in zip(mine, wanted, strict=True):
                compare_candidates(output, values, count)
            if request is not None and request.path not in self.effective:
                with self.logits(None) as logits:
                    plain = [logits(output).log_softmax(-1) for output in mine]
                check_effect(request, torch.cat(wanted), torch.cat(plain))
                self.effective.add(request.path)

    @contextmanager
    def logprobs(
        self,
        request: ParadeRequest | None,
        pooling_dtype: torch.dtype = torch.float32,
        rule: Rule | None = None,
        grammar: bool = False,
    ) -> Iterator[Callable[[Any], tuple[list[int], torch.Tensor]]]:
        """Yield a function from an output to the most likely tokens and the answered tokens' log-probabilities."""
        with self.logits(request, pooling_dtype) as logits:

            def logprobs(output: Any) -> tuple[list[int], torch.Tensor]:
                prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
                free = logits(output, len(answer))
                ruled = free
                if rule is not None:
                    ruled = torch.stack([rule(row, prompt, answer[:step]) for step, row in enumerate(free)])
                values = (ruled if grammar else free).log_softmax(-1)
                return ruled.argmax(-1).tolist(), values[torch.arange(len(answer)), torch.tensor(answer)]

            yield logprobs

    @contextmanager
    def logits(
        self, request: ParadeRequest | None, pooling_dtype: torch.dtype = torch.float32
    ) -> Iterator[Callable[..., torch.Tensor]]:
        """Yield a function from an output to the logits of its last tokens, [tokens, vocabulary].

        The function's second argument is the number of tokens; by default all but the prompt's first.
        """
        model: Any = self.base
        if request is not None:
            model = PeftModel.from_pretrained(self.base, request.path)
            model.base_model.pooling_dtype = pooling_dtype

        # Cached, because equal requests have equal logits.
        @cache
        @torch.no_grad()
        def forward(prompt_tokens: int, tokens: tuple[int, ...], last: int) -> torch.Tensor:
            ids = torch.tensor([tokens], device=self.device)
            options = {}
            if request is not None:
                instruction = request.instruction_tokens or prompt_tokens
                positions = torch.arange(ids.shape[1], device=self.device)
                options["instruction_mask"] = (positions < instruction).long()[None]
            return model(input_ids=ids, logits_to_keep=last, **options).logits[0].cpu()

        def logits(output: Any, last: int = 0) -> torch.Tensor:
            prompt = output.prompt_token_ids
            return forward(len(prompt), (*prompt, *output.outputs[0].token_ids)[:-1], last)

        try:
            yield logits
        finally:
            if request is not None:
                model.unload()

    def _compare(
        self,
        output: Any,
        request: ParadeRequest | None,
        tokens: list[int],
        values: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        answer, served = answered(output)
        where = f"{request and request.parade_name}, prompt of {len(output.prompt_token_ids)} tokens"
        assert answer == tokens, f"{where}: engine {answer}, oracle {tokens}"
        difference = (served - values).abs().max().item()
        if difference > TOLERANCE and request is not None:
            with self.logprobs(request, torch.float64, **options) as logprobs:
                bound = 3 * (logprobs(output)[1] - values).abs().max().item()
            assert difference <= bound, f"{where}: log-probabilities differ by {difference}, bound {bound}"
        else:
            assert difference <= TOLERANCE, f"{where}: log-probabilities differ by {difference}"


def by_request(
    outputs: Sequence[Any], requests: Sequence[ParadeRequest | None]
) -> list[tuple[ParadeRequest | None, list[Any]]]:
    """Each request with its outputs, in the order in which the requests first appear."""
    found: dict[int, tuple[ParadeRequest | None, list[Any]]] = {}
    for output, request in zip(outputs, requests, strict=True):
        found.setdefault(id(request), (request, []))[1].append(output)
    return list(found.values())


def answered(output: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens of an engine's answer and their log-probabilities."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return tokens, torch.tensor([step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)])


def check_effect(request: ParadeRequest, values: torch.Tensor, plain: torch.Tensor) -> None:
    """Assert that the adapter's log-probabilities differ from the base model's."""
    effect = (values - plain).abs().mean().item()
    assert effect > ENOUGH, f"{request.parade_name} changes log-probabilities by only {effect:.1e}, too little to test"


def compare_candidates(output: Any, values: torch.Tensor, count: int) -> None:
    """Assert an output's candidates. Candidates closer to each other than the tolerance may be in another order."""
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    steps = [*(output.prompt_logprobs or [None] * len(prompt))[1:], *completion.logprobs]
    for step, token, row in zip(steps, [*prompt, *completion.token_ids][1:], values, strict=True):
        if step is None:
            continue
        assert token in step
        best = sorted(step.values(), key=lambda candidate: candidate.rank)[:count]
        assert [candidate.rank for candidate in best] == list(range(1, count + 1))
        served = torch.tensor([candidate.logprob for candidate in step.values()])
        assert (served - row[list(step)]).abs().max() <= TOLERANCE
        assert (torch.tensor([one.logprob for one in best]) - row.topk(count).values).abs().max() <= TOLERANCE


def beams(model: Any, prompt: list[int], tokens: int) -> Any:
    """The reference's three best answers of exactly `tokens` tokens: `sequences` and their `sequences_scores`."""
    return model.generate(
        torch.tensor([prompt]),
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_scores=True,
        return_dict_in_generate=True,
    )
