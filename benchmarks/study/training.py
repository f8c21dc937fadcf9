# SPDX-License-Identifier: Apache-2.0
"""Trains a group's runs; each run ends with its parameters of the lowest dev loss."""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.batch import Batch
from benchmarks.study.data import Batches
from benchmarks.study.stack import Stack
from benchmarks.study.steps import Steps

EVAL_EVERY = 100
WARM_UP = 0.06


class Clock:
    """Measures seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        """Seconds of all laps."""
        return sum(self.seconds.values())


def train(stack: Stack, batches: Batches, clock: Clock, eval_every: int, deadline: float) -> dict[str, list[Any]]:
    """Train all runs. Afterwards the stack holds each run's parameters at its lowest dev loss.

    Args:
        eval_every: steps between evaluations of the dev loss
        deadline: time.monotonic() at which training stops, even if steps are left

    Returns:
        for each run its lowest dev loss (mean over tasks, and per task), the step of it, and the number of steps done
    """
    group, training = batches.group, batches.training()
    sizes = {batch.ids.shape: batch for batch in training}
    take_step = Steps(stack, list(sizes.values()))
    dev = {name: batches.dev(name) for name in group.tasks}
    best, lowest = stack.flat.detach().clone(), _dev_losses(stack, dev)
    best_steps = torch.zeros(len(group.runs), dtype=torch.long, device=stack.device)
    clock.lap("prepare_s")
    for step, batch in enumerate(training, 1):
        take_step(batch, _share(step, group.steps))
        last = step == group.steps or time.monotonic() > deadline
        if step % eval_every and not last:
            continue
        if stack.device.type == "cuda":
            torch.cuda.synchronize()
        clock.lap("train_s")
        losses = _dev_losses(stack, dev)
        better = losses.mean(dim=0) < lowest.mean(dim=0)
        lowest, best_steps = torch.where(better, losses, lowest), torch.where(better, step, best_steps)
        best = torch.where(better[:, None], stack.flat.detach(), best)
        text = f"{group.name}, {group.method}: step {step} after {clock.total():.1f} s"
        print(f"{text}, lowest dev loss {lowest.mean(dim=0).min().item():.4f}", flush=True)
        clock.lap("dev_s")
        if last:
            break
    with torch.no_grad():
        stack.flat.copy_(best)
    return {
        "dev_loss": lowest.mean(dim=0).tolist(),
        **{f"{name}_dev_loss": losses.tolist() for name, losses in zip(dev, lowest, strict=True)},
        "best_step": best_steps.tolist(),
        "steps_done": [step] * len(group.runs),
    }


@torch.no_grad()
def _dev_losses(stack: Stack, dev: dict[str, Batch]) -> Tensor:
    """Dev loss of each task and run, [tasks, runs]."""
    return torch.stack([stack.losses(batch) for batch in dev.values()])


def _share(step: int, steps: int) -> float:
    """Learning rate as a share of the highest one: a linear rise over 6 % of the steps, then a linear fall to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return min(step / warm_up, (steps - step + 1) / max(1, steps - warm_up + 1))
