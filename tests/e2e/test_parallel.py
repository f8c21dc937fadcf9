"""Tensor parallelism with two ranks, and pipeline parallelism with two stages.

With two stages, a step is planned before the previous one has answered.
"""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.oracle import Oracle
from testing.random_models import INNER, make_adapter, make_tiny_model
from tests.conversations import MARKERS, marked_prompts
from tests.engines import engine, greedy
from tests.processes import use_processes
from vllm_parade import ParadeRequest
from vllm_parade.adapter import SITES, BaseModelShape

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs, or none"),
]

# Few rows, slots, tokens and blocks: requests wait, are preempted and reuse rows of finished requests.
TIGHT: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "enable_parade": True,
    "parade_sites": SITES,
    "skip_tokenizer_init": True,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 128,
    "max_model_len": 192,
    "block_size": 32,
    "max_parades": 1,
    "max_cpu_parades": 4,
    "parade_vector_cache": 1,
}


@pytest.fixture
def adapters(tiny: str, tmp_path: Path) -> list[ParadeRequest]:
    from transformers import AutoConfig

    shape = BaseModelShape.from_hf_config(AutoConfig.from_pretrained(tiny))
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "five": {"sites": SITES, "r": 8, "num_capsules": 2},
        "attention": {"generator_input": "attention_input"},
        # Adjusts the first layer of the second stage, and no layer of the first stage.
        "last_layer": {"layers_to_transform": (2,), "sites": ("q", "v")},
        "turns": MARKERS,
    }
    return [
        make_adapter(tmp_path / name, shape, seed, inner=INNER, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    ]


@pytest.fixture(autouse=True)
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_processes(tmp_path, monkeypatch)


def check(model: str, lengths: list[int], tokens: int, adapters: list[ParadeRequest], **options: Any) -> None:
    """Ask each prompt twice: the second request may find vectors that are cached or just being generated."""
    asked = [prompt for prompt in marked_prompts(lengths) for _ in range(2)]
    users = islice(cycle([*adapters, None]), len(lengths))
    requests = [user for user in users for _ in range(2)]
    with engine(model, **TIGHT, **options) as llm:
        assert llm.llm_engine.vllm_config.max_concurrent_batches > 1
        outputs = llm.generate(asked, greedy(tokens, detokenize=False), parade_request=requests, use_tqdm=False)
        preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    Oracle(model).check(outputs, requests)


def test_two_stages(tiny: str, adapters: list[ParadeRequest]) -> None:
    lengths = [1, 2, 17, 34, 55, 89, 120, 100, 31, 32, 65, 48, 7, 80]
    # vLLM's CPU worker allocates a later stage's receive buffers at warm-up, and warms up compiled models only. The
    # "eager" backend leaves the model unchanged.
    compiled = {"enforce_eager": False, "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}}
    check(tiny, lengths, 30, adapters, num_gpu_blocks_override=16, **compiled)


@pytest.mark.triton
def test_two_stages_under_model_runner_v2(tiny: str, adapters: list[ParadeRequest]) -> None:
    check(tiny, [40, 50, 60, 30, 45, 55], 30, adapters, num_gpu_blocks_override=8)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_ranks(tmp_path: Path, kv_heads: int) -> None:
    """With one KV head, both ranks hold a copy of it."""
    model = str(tmp_path / "model")
    shape = make_tiny_model(tmp_path / "model", kv_heads=kv_heads)
    a = make_adapter(tmp_path / "a", shape, 1, inner=INNER)
    five = make_adapter(
        tmp_path / "five", shape, 2, inner=INNER, sites=("q", "k", "v", "gate", "up"), r=8, num_capsules=2
    )
    turns = make_adapter(tmp_path / "turns", shape, 3, inner=INNER, **MARKERS)
    requests = [None, a, five, turns] * 3
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 120, 200]
    options = {"enable_parade": True, "parade_sites": ["q", "k", "v", "gate", "up"], "max_parades": 1}
    with engine(model, tensor_parallel_size=2, skip_tokenizer_init=True, max_cpu_parades=4, **options) as llm:
        outputs = llm.generate(
            marked_prompts(lengths), greedy(detokenize=False), parade_request=requests, use_tqdm=False
        )
    Oracle(model).check(outputs, requests)
