# SPDX-License-Identifier: Apache-2.0
"""The layers of a loaded model, taught to generate vectors and to be scaled by them."""

from vllm_parade.layers.batch import BatchMetadata
from vllm_parade.layers.generator import ParadeLayer
from vllm_parade.layers.model import adjust_model

__all__ = ["BatchMetadata", "ParadeLayer", "adjust_model"]
