# SPDX-License-Identifier: Apache-2.0
"""The RPCs that a benchmark sends to its workers."""

import re
from dataclasses import replace
from typing import Any

import torch

# Names of the kernels and ops for communication between GPUs or CPU processes.
COLLECTIVE = re.compile(
    r"nccl|gloo:|shm_(all|send|recv)|cross_device|all_?reduce|all_?gather|reduce_?scatter|broadcast_?kernel",
    re.IGNORECASE,
)


class WorkerExtension:
    """Methods that vLLM adds to the workers (`worker_extension_cls`), for `collective_rpc`."""

    def start_recording(self) -> None:
        """Start the profiler."""
        self.recorded = torch.profiler.profile()
        self.recorded.start()

    def stop_recording(self) -> dict[str, tuple[int, float]]:
        """Stop the profiler. Returns count and total microseconds by kernel name (on CPUs, by op name)."""
        self.recorded.stop()
        on_gpu = torch.cuda.is_available()
        device = torch.profiler.DeviceType.CUDA if on_gpu else torch.profiler.DeviceType.CPU
        ran: dict[str, tuple[int, float]] = {}
        for event in self.recorded.events():
            if event.device_type == device:
                count, microseconds = ran.get(event.name, (0, 0.0))
                more = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                ran[event.name] = count + 1, microseconds + more
        return ran

    def parade_static(self, static: bool) -> None:
        """Switch generators off (`static`) or on. While off, rows keep their vectors, like static vectors."""
        manager = self.model_runner.parade  # type: ignore[attr-defined]
        manager.__dict__.pop("prepare", None)
        if static:
            prepare = manager.prepare

            def without_instructions(plan: Any, *args: Any, **kwargs: Any) -> Any:
                return prepare(replace(plan, readings={}), *args, **kwargs)

            manager.prepare = without_instructions

    def allocated_bytes(self) -> int:
        """Peak device memory of this worker's tensors, in bytes."""
        return torch.cuda.max_memory_allocated()

    def parade_bytes(self) -> dict[str, int]:
        """Device memory of the vector tables and of the adapters' slots, in bytes."""
        slots = self.model_runner.parade.slots  # type: ignore[attr-defined]
        return {
            "tables": sum(layer.table.nbytes for layer in slots.layers),
            "slots": slots.device_bytes,
        }
