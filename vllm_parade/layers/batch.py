# SPDX-License-Identifier: Apache-2.0
"""What the layers must know of a step: filled by the runner, read by the layers, which never see requests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_parade.ops import use_kernels
from vllm_parade.ops.job import GeneratorJob, GeneratorStep


@dataclass
class BatchMetadata:
    """One per engine, made once. CUDA graphs replay the address of `token_rows`, so it is only ever filled."""

    token_rows: Tensor
    """[max_num_batched_tokens] int32 on the device: row of every token of the step, 0 for padding."""
    workspace: Tensor | None
    """[workspace size] float32, what one kernel leaves for the next; None without kernels."""
    jobs: list[GeneratorJob] = field(default_factory=list)
    """The instructions of this step."""
    step: GeneratorStep | None = None
    """The same on the device, for the kernels."""

    @classmethod
    def make(cls, max_num_tokens: int, max_rank: int, device: torch.device) -> "BatchMetadata":
        """Allocate for steps of at most `max_num_tokens` tokens and adapters of at most `max_rank`."""
        workspace = None
        if use_kernels(device):
            from vllm_parade.ops.generate import workspace_size

            workspace = torch.empty(workspace_size(max_num_tokens, max_rank), device=device)
        return cls(
            token_rows=torch.zeros(max_num_tokens, dtype=torch.int32, device=device),
            workspace=workspace,
        )

    def prepare(self, request_rows: list[int], request_tokens: list[int], jobs: list[GeneratorJob]) -> None:
        """Fill for a step: requests in batch order, with the row and the number of scheduled tokens of each."""
        # A fresh staging buffer every step: the copy of the step before may still be under way, and PyTorch hands
        # pinned memory out again only when it is done.
        staged = torch.zeros(len(self.token_rows), dtype=torch.int32, pin_memory=self.token_rows.is_cuda)
        rows = torch.tensor(request_rows, dtype=torch.int32).repeat_interleave(torch.tensor(request_tokens))
        staged[: len(rows)] = rows
        self.token_rows.copy_(staged, non_blocking=True)
        self.jobs, self.step = jobs, None
        if jobs and self.workspace is not None:
            self.step = GeneratorStep.make(jobs, self.token_rows.device)

    def clear(self) -> None:
        """Prepare for a run without requests (warm-up, profiling, graph capture)."""
        self.token_rows.zero_()
        self.jobs, self.step = [], None
