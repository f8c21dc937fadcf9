# SPDX-License-Identifier: Apache-2.0
"""Models and adapters made for benchmarks."""

import random
from pathlib import Path

from benchmarks.models import SIZES, make_model, make_parades
from vllm_parade.adapter import BaseModelShape, load_adapter

SHAPE = BaseModelShape(8, 1, {"q": 8, "k": 4, "v": 4, "gate": 16, "up": 16})


def test_made_adapters_differ_in_content_and_stay(tmp_path: Path):
    paths = make_parades(tmp_path, SHAPE, 5)
    assert len({load_adapter(path, SHAPE, max_rank=12, sites=("q", "v", "up")).content_hash for path in paths}) == 5
    before = (Path(paths[2]) / "adapter_model.safetensors").stat().st_mtime_ns
    assert make_parades(tmp_path, SHAPE, 3) == paths[:3]
    assert (Path(paths[2]) / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_model_has_a_tokenizer(tmp_path: Path):
    from transformers import AutoTokenizer

    make_model(tmp_path, "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = random.Random(0).sample(range(3, SIZES["tiny"]["vocab_size"]), 20)
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids
    assert tokenizer.eos_token_id == 2
