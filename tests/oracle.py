"""The float32 oracle: what Transformers and PEFT with `vllm_parade.tuner` answer, one request at a time."""

from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

import vllm_parade.tuner  # noqa: F401  teaches PEFT the method
from vllm_parade import ParadeRequest

TOLERANCE = 1e-3
# An adapter that moves log-probabilities by less than this, on average, shows nothing by being right.
ENOUGH = 20 * TOLERANCE


class Oracle:
    """Checks engine outputs by running each prompt with its answer through the model once.

    Greedy decoding is right where every answered token is the most likely one after the tokens before it.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def check(self, outputs: list[Any], requests: list[ParadeRequest | None]) -> None:
        """Assert that tokens are equal, and log-probabilities within the bound."""
        assert len(outputs) == len(requests)
        for request in {id(request): request for request in requests}.values():
            mine = [output for output, other in zip(outputs, requests, strict=True) if other is request]
            with self.model(request) as logprobs:
                wanted = [logprobs(output) for output in mine]
            for output, (tokens, values) in zip(mine, wanted, strict=True):
                self._compare(output, request, tokens, values)
            if request is not None:
                self._check_effect(request, mine, wanted)

    def _check_effect(self, request: ParadeRequest, outputs: list[Any], wanted: list[Any]) -> None:
        with self.model(None) as logprobs:
            moved = [(values - logprobs(output)[1]).abs() for output, (_, values) in zip(outputs, wanted, strict=True)]
        effect = torch.cat(moved).mean().item()
        assert effect > ENOUGH, (
            f"{request.parade_name} moves log-probabilities by {effect:.1e} only: no test of anything"
        )

    @contextmanager
    def model(self, request: ParadeRequest | None, pooling_dtype: torch.dtype = torch.float32) -> Any:
        """A function from an output to the most likely tokens and the log-probabilities of those answered."""
        model: Any = self.base
        if request is not None:
            model = PeftModel.from_pretrained(self.base, request.path)
            model.base_model.pooling_dtype = pooling_dtype

        @torch.no_grad()
        def logprobs(output: Any) -> tuple[list[int], torch.Tensor]:
            prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
            ids = torch.tensor([prompt + answer[:-1]])
            options = {}
            if request is not None:
                instruction = request.instruction_tokens or len(prompt)
                options["instruction_mask"] = (torch.arange(ids.shape[1]) < instruction).long()[None]
            logits = model(input_ids=ids, **options).logits[0, len(prompt) - 1 :]
            values = logits.log_softmax(-1)
            return logits.argmax(-1).tolist(), values[torch.arange(len(answer)), torch.tensor(answer)]

        try:
            yield logprobs
        finally:
            if request is not None:
                model.unload()

    def _compare(self, output: Any, request: ParadeRequest | None, tokens: list[int], values: torch.Tensor) -> None:
        completion = output.outputs[0]
        answer = list(completion.token_ids)
        where = f"{request and request.parade_name}, prompt of {len(output.prompt_token_ids)} tokens"
        assert answer == tokens, f"{where}: engine {answer}, oracle {tokens}"
        served = torch.tensor([step[token].logprob for step, token in zip(completion.logprobs, answer, strict=True)])
        difference = (served - values).abs().max().item()
        if difference > TOLERANCE and request is not None:
            with self.model(request, torch.float64) as logprobs:
                bound = 3 * (logprobs(output)[1] - values).abs().max().item()
            assert difference <= bound, f"{where}: log-probabilities differ by {difference}, bound {bound}"
        else:
            assert difference <= TOLERANCE, f"{where}: log-probabilities differ by {difference}"


def beams(model: Any, prompt: list[int], tokens: int) -> Any:
    """The reference's three best answers of exactly so many tokens, `sequences` with their `sequences_scores`."""
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
