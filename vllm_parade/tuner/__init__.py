# SPDX-License-Identifier: Apache-2.0
"""PARADE on Hugging Face models, for training and as a reference. Nothing in here imports vLLM."""

from vllm_parade.tuner.model import ParadeModel

__all__ = ["ParadeModel"]
