# SPDX-License-Identifier: Apache-2.0
"""What the layers must know of a step: filled by the runner, read by the layers, which never see requests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class GeneratorJob:
    """An instruction that passes in this step: read tokens [start, stop) of the batch, write `row`."""

    adapter: str
    """Content hash of the adapter, which holds a slot during this step."""
    row: int
    start: int
    stop: int


@dataclass
class BatchMetadata:
    """One per engine, made once. CUDA graphs replay the address of `token_rows`, so it is only ever filled."""

    token_rows: Tensor
    """[max_num_batched_tokens] int32 on the device: row of every token of the step, 0 for padding."""
    token_rows_cpu: Tensor
    """Its staging buffer on the host."""
    jobs: list[GeneratorJob] = field(default_factory=list)

    @classmethod
    def make(cls, max_num_tokens: int, device: torch.device) -> "BatchMetadata":
        """Allocate for steps of at most `max_num_tokens` tokens."""
        pin = device.type == "cuda"
        return cls(
            token_rows=torch.zeros(max_num_tokens, dtype=torch.int32, device=device),
            token_rows_cpu=torch.zeros(max_num_tokens, dtype=torch.int32, pin_memory=pin),
        )

    def prepare(self, request_rows: list[int], request_tokens: list[int], jobs: list[GeneratorJob]) -> None:
        """Fill for a step: requests in batch order, with the row and the number of scheduled tokens of each."""
        rows = torch.tensor(request_rows, dtype=torch.int32).repeat_interleave(torch.tensor(request_tokens))
        self.token_rows_cpu[: len(rows)] = rows
        self.token_rows_cpu[len(rows) :] = 0
        self.token_rows.copy_(self.token_rows_cpu, non_blocking=True)
        self.jobs = jobs

    def clear(self) -> None:
        """Prepare for a run without requests (warm-up, profiling, graph capture)."""
        self.token_rows.zero_()
        self.jobs = []
