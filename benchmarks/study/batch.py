# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses of many runs as one batch, with nothing left to find out by looking at its values."""

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
    """How many of the ids are the prompt's."""


class Batch(NamedTuple):
    """Pairs of all runs, those of each run together."""

    ids: Tensor
    """[runs * rows, tokens], padded on the right: causal attention needs no mask then."""
    instruction: Tensor
    """What generators read, [runs * rows, tokens] bool."""
    places: Tensor
    """Of the positions, counted through the whole batch, those that predict a response's token, [runs, learnt]."""
    targets: Tensor
    """What they predict, [runs, learnt]; padded with IGNORED_LABEL."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def widen(self, learnt: int) -> "Batch":
        """The same with that many places for each run."""
        missing = (0, learnt - self.places.shape[1])
        targets = F.pad(self.targets, missing, value=IGNORED_LABEL)
        return self._replace(places=F.pad(self.places, missing), targets=targets)


def collate(pairs: Sequence[Pair], runs: int, multiple: int = 1) -> Batch:
    """Pad pairs to a multiple of so many tokens."""
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
