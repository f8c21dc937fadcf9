# SPDX-License-Identifier: Apache-2.0
"""What the layers must know of a step: filled by the runner, read by the layers, which never see requests."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_parade.ops.job import GeneratorJob, GeneratorStep, step_size


@dataclass
class BatchMetadata:
    """One per engine, made once and then only filled: CUDA graphs replay its addresses."""

    buffer: Tensor
    """[token rows | generator step] int32 on the device, filled by one copy a step."""
    token_rows: Tensor
    """[max_num_batched_tokens] int32, a view: row of every token of the step, 0 for padding."""
    step: GeneratorStep
    """The instructions of the step for the kernels: views."""
    workspace: Tensor | None
    """[workspace size] float32, what one kernel leaves for the next; None where generators run as the reference."""
    max_rank: int
    """Largest r of any adapter, which the workspace is sized for."""
    jobs: list[GeneratorJob] = field(default_factory=list)
    """The instructions of this step."""
    is_clear: bool = True
    """Whether all rows and counts in the buffer are zero: nothing but the base model runs."""

    @classmethod
    def make(
        cls, max_num_tokens: int, max_num_seqs: int, max_rank: int, device: torch.device, *, kernels: bool
    ) -> "BatchMetadata":
        """Allocate for steps of at most so many tokens and requests, and adapters of at most `max_rank`.

        Args:
            kernels: whether generators run as Triton kernels; else as the reference
        """
        workspace = None
        if kernels:
            from vllm_parade.ops.generate import workspace_size

            workspace = torch.empty(workspace_size(max_num_tokens, max_rank), device=device)
        # Kernels may load in wide pieces what begins at a multiple of 16 bytes.
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
        """Fill for a step: requests in batch order, with the row and the number of scheduled tokens of each."""
        self.jobs = jobs
        # Where nobody uses an adapter, a step costs nothing.
        nothing = not any(request_rows)
        if nothing and self.is_clear:
            return
        self.is_clear = nothing
        step_start = self.step.counts.storage_offset()
        # Without instructions the counts alone say so; what stands behind them is not read.
        used = len(self.buffer) if jobs else step_start + len(self.step.counts)
        # A fresh staging buffer every step: the copy of the step before may still be under way, and PyTorch hands
        # pinned memory out again only when it is done.
        staged = torch.zeros(used, dtype=torch.int32, pin_memory=self.buffer.is_cuda)
        rows = np.repeat(request_rows, request_tokens)
        staged.numpy()[: len(rows)] = rows
        if jobs:
            GeneratorStep.in_buffer(staged[step_start:], len(self.step.jobs)).fill(jobs)
        self.buffer[:used].copy_(staged, non_blocking=True)

    def clear(self) -> None:
        """Prepare for a run without requests (warm-up, profiling, graph capture)."""
        self.buffer.zero_()
        self.jobs, self.is_clear = [], True
