# SPDX-License-Identifier: Apache-2.0
"""Training steps of a stack, as CUDA graphs if there is a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.study.batch import Batch
from benchmarks.study.stack import Stack


class Steps:
    """Training steps on batches of a few sizes. On CUDA, each size has a graph, because steps are launch-bound."""

    def __init__(self, stack: Stack, examples: Sequence[Batch]) -> None:
        """
        Args:
            examples: one batch of each size
        """
        self.stack, self._pool = stack, None
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        if stack.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            # The largest first, so that the others reuse its memory.
            for batch in sorted(examples, key=lambda batch: -batch.ids.numel()):
                self._graphs[batch.ids.shape] = self._capture(batch.to(stack.device))
            stack.reset_optimizer()

    def __call__(self, batch: Batch, share: float) -> None:
        """
        Args:
            share: learning rate as a share of the highest one
        """
        if self._pool is None:
            self._step(batch, torch.tensor(share))
            return
        graph, inputs, inputs_share = self._graphs[batch.ids.shape]
        for static, tensor in zip(inputs, batch, strict=True):
            static.copy_(tensor)
        inputs_share.fill_(share)
        graph.replay()

    def _step(self, batch: Batch, share: Tensor) -> None:
        self.stack.step(self.stack.losses(batch), share)

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        # A learning rate of 0, so that the warm-up does not change the parameters.
        share = torch.zeros((), device=self.stack.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(batch, share)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(batch, share)
        return graph, batch, share
