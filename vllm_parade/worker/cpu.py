# SPDX-License-Identifier: Apache-2.0
"""The worker class for CPUs."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_parade.worker.worker import ParadeWorkerMixin


class ParadeCPUWorker(ParadeWorkerMixin, CPUWorker):
    """vLLM's CPU worker with PARADE adapters."""
