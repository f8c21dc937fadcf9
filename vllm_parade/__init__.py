# SPDX-License-Identifier: Apache-2.0
"""PARADE adapters for vLLM: many tenants' prompt-aware adapters in one batch, at the base model's decode speed."""

from typing import TYPE_CHECKING, Any

from vllm_parade.plugin import install_keyword_seams
from vllm_parade.request import ParadeRequest

__version__ = "0.2.0"

__all__ = ["ParadeConfig", "ParadeRequest", "__version__"]

# EngineArgs rejects unknown keywords before vLLM loads plugins, so `LLM(model, enable_parade=True)` needs this call at
# import. It does not import vLLM.
install_keyword_seams()

if TYPE_CHECKING:
    from vllm_parade.tuner import ParadeConfig


def __getattr__(name: str) -> Any:
    # Imported on demand: the tuner loads PEFT and Transformers for training.
    if name == "ParadeConfig":
        from vllm_parade.tuner import ParadeConfig

        return ParadeConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
