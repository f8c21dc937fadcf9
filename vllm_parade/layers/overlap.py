# SPDX-License-Identifier: Apache-2.0
"""A second stream, so that generators cost a layer little time."""

import torch


class SideStream:
    """Where generators run while their layer goes on to the projection whose output they scale.

    A CUDA graph captures the two as parallel branches. Without CUDA everything runs in its place.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        self._running = False
        if device.type == "cuda":
            # Generators are small: they go first wherever a multiprocessor is free.
            self.stream = torch.cuda.Stream(device, priority=-1)
            self._forked, self._done = torch.cuda.Event(), torch.cuda.Event()

    def fork(self) -> None:
        """Let the side stream begin where the current one stands."""
        if self.stream is not None:
            self._forked.record()
            self.stream.wait_event(self._forked)
            self._running = True

    def join(self) -> None:
        """Let the current stream wait for what was begun since `fork`; without one, for nothing."""
        if self._running and self.stream is not None:
            self._done.record(self.stream)
            torch.cuda.current_stream().wait_event(self._done)
            self._running = False
