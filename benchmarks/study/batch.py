# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses of many runs as one batch.

A training step does not read the batch's values on the host, so a CUDA graph can capture the step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_parade.train.data import IGNORED_LABEL


class Pair(NamedTuple):
    """A prompt and its response."""

    ids: Tensor
    prompt: int
    """Number of prompt tokens in `ids`."""


class Batch(NamedTuple):
    """Pairs of all runs, ordered by run."""

    ids: Tensor
    """[runs * rows, tokens], padded on the right, so that causal attention needs no mask."""
    instruction: Tensor
    """Positions that the generators read, [runs * rows, tokens] bool."""
    places: Tensor
    """Indices into the flattened batch of the positions that predict response tokens, [runs, learnt]."""
    targets: Tensor
    """Tokens to predict at `places`, [runs, learnt]; padded with IGNORED_LABEL."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def widen(self, learnt: int) -> "Batch":
        """The batch with `learnt` places per run, padded."""
        missing = (0, learnt - self.places.shape[1])
        targets = F.pad(self.targets, missing, value=IGNORED_LABEL)
        return self._replace(places=F.pad(self.places, missing), targets=targets)


def collate(pairs: Sequence[Pair], runs: int, multiple: int = 1) -> Batch:
    """Make a batch of pairs ordered by run, padded to a multiple of `multiple` tokens."""
    starts, ends = (
        torch.tensor(sizes)[:, None] for sizes in zip(*((p.prompt, len(p.ids)) for p in pairs), strict=True)
    )
    ids = pad_sequence([pair.ids for pair in pairs], batch_first=True)
    ids = F.pad(ids, (0, -ids.shape[1] % multiple))
    position = torch.arange(ids.shape[1])
    learnt = ((position >= starts - 1) & (position < ends - 1)).flatten().chunk(runs)
    places = [run * len(part) + part.nonzero().flatten() for run, part in enumerate(learnt)]
    following = ids.roll(-1, dims=1).flatten()
    targets = pad_sequence([following[part] for part in places], batch_first=True, padding_value=IGNORED_LABEL)
    return Batch(ids, position < starts, pad_sequence(places, batch_first=True), targets)
