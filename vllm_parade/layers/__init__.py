# SPDX-License-Identifier: Apache-2.0
"""Hooks on a loaded model: generate vectors, and scale projections by them."""

from vllm_parade.layers.batch import BatchMetadata
from vllm_parade.layers.generator import ParadeLayer
from vllm_parade.layers.model import adjust_model

__all__ = ["BatchMetadata", "ParadeLayer", "adjust_model"]
