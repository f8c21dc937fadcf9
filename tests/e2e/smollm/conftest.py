# SPDX-License-Identifier: Apache-2.0
"""Tests on the real small model share one engine with room for everything."""

from typing import Any

import pytest

from tests.engines import shared
from vllm_parade.adapter import SITES

BLOCK = 32
BASE = {
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 1 << 30,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
PARADE = {"enable_parade": True, "parade_sites": SITES, "max_parades": 4, "max_cpu_parades": 96}


@pytest.fixture(scope="module")
def llm(smollm: str) -> Any:
    return shared(smollm, **BASE, **PARADE)


@pytest.fixture(scope="module")
def plain(smollm: str) -> Any:
    """An engine without the plugin. Starting it closes the engine with PARADE."""
    return shared(smollm, **BASE)
