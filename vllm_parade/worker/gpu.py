# SPDX-License-Identifier: Apache-2.0
"""The worker class for NVIDIA GPUs."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_parade.worker.worker import ParadeWorkerMixin


class ParadeGPUWorker(ParadeWorkerMixin, Worker):
    """vLLM's GPU worker with PARADE adapters."""
