# SPDX-License-Identifier: Apache-2.0
"""The application that the tests of this folder share, and the reference answers of a single engine.

The application starts in a minute on a machine with two cores. The model is small and random, because these tests check
processes, not models.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import make_tokenizer
from testing.random_models import INNER, make_adapter, make_tiny_model
from tests import clusters
from tests.adapters import VARIANTS
from tests.clusters import Cluster
from tests.engines import engine, greedy
from tests.questions import BASE, CHAT, FRESH, LATE, MIXED, NAMES, PLAIN, STREAMS, VOCABULARY, Right
from vllm_parade import ParadeRequest


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="package")
def model(folder: Path) -> str:
    make_tiny_model(folder / "model")
    make_tokenizer(folder / "model", VOCABULARY)
    return str(folder / "model")


@pytest.fixture(scope="package")
def adapters(folder: Path, model: str) -> dict[str, ParadeRequest]:
    from transformers import AutoConfig

    from vllm_parade.adapter import BaseModelShape

    shape = BaseModelShape.from_hf_config(AutoConfig.from_pretrained(model))
    names = enumerate([*NAMES, LATE])
    return {
        name: make_adapter(folder / name, shape, seed, **{"inner": INNER, **VARIANTS[name]}) for seed, name in names
    }


@pytest.fixture(scope="package")
def right(model: str, adapters: dict[str, ParadeRequest]) -> dict[str, Right]:
    """Reference answers of a single engine, by question."""
    asked = [*MIXED, *STREAMS, *PLAIN, *FRESH, CHAT]
    with engine(model, enable_parade=True, max_num_seqs=32) as llm:
        inputs: Any = [{"prompt_token_ids": prompt} for _, prompt, _ in asked]
        params = [greedy(tokens, logprobs=2) for _, _, tokens in asked]
        requests = [adapters.get(name) for name, _, _ in asked]
        answers = llm.generate(inputs, params, parade_request=requests, use_tqdm=False)
        plain = llm.generate(inputs[: len(MIXED)], params[: len(MIXED)], use_tqdm=False)
    told = {str(one): Right.of(answer.outputs[0]) for one, answer in zip(asked, answers, strict=True)}
    changed = sum(Right.of(other.outputs[0]) != told[str(one)] for one, other in zip(MIXED, plain, strict=True))
    # The base model must answer differently, or the comparison cannot detect a missing adapter.
    assert changed > 0.9 * sum(name != BASE for name, _, _ in MIXED)
    # Most tokens must be clear enough to compare.
    assert sum(one.clear for one in told.values()) > 0.9 * sum(len(one.tokens) for one in told.values())
    return told


@pytest.fixture(scope="package")
def app(model: str, adapters: dict[str, ParadeRequest], right: dict[str, Right]) -> Iterator[Cluster]:
    pytest.importorskip("ray.serve")
    options = {
        "served_model_name": BASE,
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "max_parade_rank": 32,
    }
    given = [f"{name}={adapters[name].path}" for name in NAMES]
    with clusters.cluster(model=model, engine=options, adapters=given, replicas=2) as app:
        yield app
