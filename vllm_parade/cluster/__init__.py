# SPDX-License-Identifier: Apache-2.0
"""More than one replica: which of them gets a request. Nothing in here imports vLLM or Ray."""

from vllm_parade.cluster.routing import AffinityRule

__all__ = ["AffinityRule"]
