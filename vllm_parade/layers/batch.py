# SPDX-License-Identifier: Apache-2.0
"""Metadata of a step. The runner fills it, and the layers read it; layers do not see requests."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_parade.ops.job import GeneratorJob, GeneratorStep, step_size


@dataclass
class BatchMetadata:
    """Allocated once per worker and filled every step, because CUDA graphs replay its addresses."""

    buffer: Tensor
    """[token rows | generator step] int32 on the device, filled by one copy per step."""
    token_rows: Tensor
    """[max_num_batched_tokens] int32, a view of `buffer`: row of every token of the step, 0 for padding."""
    step: GeneratorStep
    """The instructions of the step for the kernels, as views of `buffer`."""
    workspace: Tensor | None
    """[workspace size] float32, results that one kernel passes to the next; None if generators run as the reference."""
    max_rank: int
    """Largest r of any adapter; determines the size of the workspace."""
    jobs: list[GeneratorJob] = field(default_factory=list)
    """The instructions of this step."""
    is_clear: bool = True
    """Whether all rows and counts in the buffer are zero, so that only the base model runs."""

    @classmethod
    def make(
        cls, max_num_tokens: int, max_num_seqs: int, max_rank: int, device: torch.device, *, kernels: bool
    ) -> "BatchMetadata":
        """Allocate for steps of at most `max_num_tokens` tokens and `max_num_seqs` requests, and r up to `max_rank`.

        Args:
            kernels: whether generators run as Triton kernels; otherwise they run as the reference
        """
        workspace = None
        if kernels:
            from vllm_parade.ops.generate import workspace_size

            workspace = torch.empty(workspace_size(max_num_tokens, max_rank), device=device)
        # Kernels need tensors that begin at a multiple of 16 bytes for wide loads.
        step_start = (max_num_tokens + 3) // 4 * 4
        size = step_start + step_size(max_num_tokens, max_num_seqs)
        buffer = torch.zeros(size, dtype=torch.int32, device=device)
        step = GeneratorStep.in_buffer(buffer[step_start:], max_num_seqs)
        return cls(
            buffer=buffer,
            token_rows=buffer[:max_num_tokens],
            step=step,
            workspace=workspace,
            max_rank=max_rank,
        )

    def prepare(self, request_rows: list[int], request_tokens: list[int], jobs: list[GeneratorJob]) -> None:
        """Fill the buffer for a step. Rows and numbers of scheduled tokens are per request, in batch order."""
        self.jobs = jobs
        # Without adapters in this step and the one before, the buffer does not change.
        nothing = not any(request_rows)
        if nothing and self.is_clear:
            return
        self.is_clear = nothing
        step_start = self.step.counts.storage_offset()
        # Without instructions, the counts are zero, and kernels read nothing behind them.
        used = len(self.buffer) if jobs else step_start + len(self.step.counts)
        # A new staging buffer per step, because the previous step's copy may still be running. PyTorch reuses pinned
        # memory only after the copy has finished.
        staged = torch.zeros(used, dtype=torch.int32, pin_memory=self.buffer.is_cuda)
        rows = np.repeat(request_rows, request_tokens)
        staged.numpy()[: len(rows)] = rows
        if jobs:
            GeneratorStep.in_buffer(staged[step_start:], len(self.step.jobs)).fill(jobs)
        self.buffer[:used].copy_(staged, non_blocking=True)

    def clear(self) -> None:
        """Clear the buffer for a run without requests (warm-up, profiling, graph capture)."""
        self.buffer.zero_()
        self.jobs, self.is_clear = [], True
