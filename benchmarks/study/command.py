# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks study`."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

PARTS = ("mixture", "senders", "long", "conditions", "variants", "budgets", "tasks")


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The study's flags, without --out."""
    sub.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    sub.add_argument("--model", required=True, help="base model of the LLaMA family")
    sub.add_argument("--data", type=Path, required=True, help="folder with one subfolder per task, named after it")
    sub.add_argument("--only", nargs="+", help="run only groups whose `NAME, METHOD` contains one of these texts")
    sub.add_argument("--steps", type=int, help="training steps; default: each group's own number")
    sub.add_argument("--minutes", type=float, default=1e9, help="stop training after this time, then measure the group")


def study(args: argparse.Namespace) -> None:
    """Train and measure the groups of the given parts, and save the results after each group."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.report import save
    from benchmarks.study.plan import GROUPS
    from benchmarks.study.study import Study
    from benchmarks.study.tables import study_tables

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    planned = [group for part in args.parts for group in GROUPS[part]()]
    groups = [g for g in planned if not args.only or any(name in f"{g.name}, {g.method}" for name in args.only)]
    folders = {task: args.data / task for group in groups for task in group.tasks}
    deadline = time.monotonic() + 60 * args.minutes
    found, results = Study(base, tokenizer, folders, deadline=deadline), []
    for group in groups:
        if time.monotonic() > deadline:
            print(f"{args.minutes} minutes are over; skipping {group.name}, {group.method} and all later groups")
            break
        mine = list(found.records(replace(group, steps=args.steps or group.steps)))
        results += mine
        save(args.out, vars(args), results)
        print(study_tables(mine), f"{mine[0]['group_s']:.0f} s", flush=True)
    print(study_tables(results))
