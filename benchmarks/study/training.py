# SPDX-License-Identifier: Apache-2.0
"""Training of a group's runs, up to each one's lowest dev loss."""

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
    """Seconds by what took them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        """Of all laps."""
        return sum(self.seconds.values())


def train(stack: Stack, batches: Batches, clock: Clock, eval_every: int, deadline: float) -> dict[str, list[Any]]:
    """Train all runs; the stack then holds every run's parameters of its lowest dev loss.

    Args:
        eval_every: steps between looks at the dev loss
        deadline: time.monotonic() at which training ends, however many steps are left

    Returns:
        of every run its lowest dev loss, mean over the tasks and of each, the step of it and the steps done
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
    """Dev loss of every task for every run, [tasks, runs]."""
    return torch.stack([stack.losses(batch) for batch in dev.values()])


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: rising for 6 % of the steps, then falling to nothing."""
    warm_up = max(1, round(WARM_UP * steps))
    return min(step / warm_up, (steps - step + 1) / max(1, steps - warm_up + 1))
