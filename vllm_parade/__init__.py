# SPDX-License-Identifier: Apache-2.0
"""PARADE adapters for vLLM: many tenants' prompt-aware adapters in one batch, at the base model's decode speed."""

from typing import TYPE_CHECKING, Any

from vllm_parade.plugin import install_keyword_seams
from vllm_parade.request import ParadeRequest

__version__ = "0.1.0"

__all__ = ["ParadeConfig", "ParadeRequest", "__version__"]

# `LLM(model, enable_parade=True)` is checked by EngineArgs before vLLM loads its plugins, so the import that brings
# ParadeRequest must also teach EngineArgs the keywords. It loads nothing of vLLM itself.
install_keyword_seams()

if TYPE_CHECKING:
    from vllm_parade.tuner import ParadeConfig


def __getattr__(name: str) -> Any:
    # PEFT and Transformers are for training: a server does not load them here.
    if name == "ParadeConfig":
        from vllm_parade.tuner import ParadeConfig

        return ParadeConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
