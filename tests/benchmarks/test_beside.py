# SPDX-License-Identifier: Apache-2.0
"""Steps of running requests beside a long prompt, with a fake engine that computes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from benchmarks.beside import QUIET_STEPS, arrival, beside
from benchmarks.samples import TINY, Measured
from tests.benchmarks.fakes import FakeVariant

CHUNK, DECODE_S = 64, 0.5


class FakeEngine:
    """Each step gives a token to every request whose prompt is computed. It computes one chunk of a prompt, in 1 s."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.unread: dict[str, int] = {}
        self.metrics: dict[str, Any] = {}
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=CHUNK))

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any, lora_request: Any = None) -> None:
        tokens = len(prompt["prompt_token_ids"])
        if str(lora_request).startswith("whole") and tokens > CHUNK:
            raise VLLMValidationError("too long")
        self.unread[name] = tokens
        self.metrics[name] = SimpleNamespace(last_token_ts=0.0, first_token_latency=0.25)

    def step(self) -> list[Any]:
        self.clock += DECODE_S
        for name, left in self.unread.items():
            if left > 0:
                self.clock += 1.0
                self.unread[name] = left - CHUNK
                break
        outputs = []
        for name in [name for name, left in self.unread.items() if left <= 0]:
            self.metrics[name].last_token_ts = self.clock
            outputs.append(
                SimpleNamespace(request_id=name, metrics=self.metrics[name], outputs=[SimpleNamespace(token_ids=[1])])
            )
        return outputs

    def abort_request(self, names: list[str]) -> None:
        self.unread.clear()

    def has_unfinished_requests(self) -> bool:
        return bool(self.unread)


def fake(name: str) -> Any:
    variant: Any = FakeVariant(name, ("a",) if name == "parade" else ())
    variant.llm = SimpleNamespace(llm_engine=FakeEngine())
    variant.prompts = lambda batch, length: [{"prompt_token_ids": [1] * length} for _ in range(batch)]
    variant.step_tokens = lambda: CHUNK
    return variant


def test_steps_beside_a_prompt_of_several_chunks() -> None:
    found = arrival(fake("base"), 3, 16, [1] * (3 * CHUNK), None)
    assert found.quiet == [DECODE_S] * QUIET_STEPS
    assert found.steps == [1 + DECODE_S] * 3
    assert found.ttft == 0.25


def test_records_say_who_was_served() -> None:
    variant = fake("parade")
    measured = Measured.__new__(Measured)
    measured.variant, measured.points = variant, TINY
    unused, marked, refused = beside(measured)
    assert [record["variant"] for record in (unused, marked, refused)] == ["unused", "parade", "parade-whole"]
    for record in (unused, marked):
        assert record["served"]
        assert record["longest_ms"] == pytest.approx(1500)
        assert record["quiet_ms"] == pytest.approx(500)
        assert record["steps"] == -(-record["prompt"] // CHUNK)
        assert len(record["longest_ms_all"]) == variant.settings.repeats
    assert not refused["served"]
    assert "longest_ms" not in refused
    assert not variant.llm.llm_engine.unread
