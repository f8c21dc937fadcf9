# SPDX-License-Identifier: Apache-2.0
"""The server's engine, `AsyncLLM`: all kinds of requests at once, disconnecting clients and rejected requests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from testing.oracle import Oracle
from tests.engines import DEFAULTS, tiny_greedy, tiny_prompts
from tests.processes import use_processes
from vllm_parade import ParadeRequest

pytestmark = pytest.mark.engine


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of an engine whose core runs in its own process."""
    use_processes(tmp_path, monkeypatch)
    return {**DEFAULTS, "enable_parade": True, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_parade_rank": 32}


async def answer(llm: Any, name: str, prompt: Any, params: Any, request: ParadeRequest | None, most: int = 99) -> Any:
    """Return a request's last output. The client disconnects after `most` tokens."""
    async with aclosing(llm.generate(prompt, params, name, lora_request=request)) as outputs:
        async for output in outputs:
            if len(output.outputs[0].token_ids) >= most:
                break
    return output


async def refuse_parts(llm: Any, request: Any) -> None:
    from vllm.engine.protocol import StreamingInput

    async def parts() -> AsyncIterator[Any]:
        for prompt in tiny_prompts([10, 20], seed=70):
            yield StreamingInput(prompt=prompt)

    with pytest.raises(VLLMValidationError, match=f"{request.parade_name!r}: streaming input is not supported"):
        await answer(llm, "parts", parts(), tiny_greedy(), request)


async def serve(options: dict[str, Any], requests: list[ParadeRequest | None]) -> dict[str, list[Any]]:
    """Ask for the same greedy answers twice, half of them with prompt candidates.

    Meanwhile some clients disconnect, and one request is rejected.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    kinds = {"plain": tiny_greedy(12), "read": tiny_greedy(12, logprobs=2, prompt_logprobs=2)}
    served: dict[str, list[Any]] = {kind: [] for kind in kinds}
    asked = tiny_prompts([40, 70, 33, 50], seed=72)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    try:
        for _ in range(2):
            answers = [
                answer(llm, f"{kind}{number}", prompt, params, request)
                for kind, params in kinds.items()
                for number, (prompt, request) in enumerate(zip(asked, requests, strict=True))
            ]
            beside = [
                answer(llm, f"gone{number}", prompt, tiny_greedy(12), requests[0], 3)
                for number, prompt in enumerate(asked)
            ]
            outputs, _ = await asyncio.gather(
                asyncio.gather(*answers), asyncio.gather(*beside, refuse_parts(llm, requests[0]))
            )
            for kind in kinds:
                served[kind] += [outputs.pop(0) for _ in requests]
            assert llm.get_num_unfinished_requests() == 0
        return served
    finally:
        llm.shutdown()


def test_all_kinds_of_requests_at_once(
    tiny: str, tiny_oracle: Oracle, tiny_variants: dict[str, ParadeRequest], options: dict[str, Any]
) -> None:
    requests = [tiny_variants["strong"], None, tiny_variants["routing"], tiny_variants["rank8"]]
    served = asyncio.run(serve({**options, "model": tiny}, requests))
    requests = requests * 2
    tiny_oracle.check(served["plain"] + served["read"], requests * 2)
    tiny_oracle.check_candidates(served["read"], requests, 2)
