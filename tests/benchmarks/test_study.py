# SPDX-License-Identifier: Apache-2.0
"""The study: what it runs, what it measures, and its tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.__main__ import STUDY_PARTS
from benchmarks.plan import PARTS, best_rate, plan, study_tables
from benchmarks.senders import SENDERS, read_senders
from benchmarks.stacked import Hyperparameters
from benchmarks.study import Group, Study, template_size
from tests.tasks import write_sst2
from vllm_parade.train.data import encode_prompt
from vllm_parade.train.methods import peft_config
from vllm_parade.train.readers import read_sst2
from vllm_parade.train.templates import SST2_ANSWERS

ROOT = Path(__file__).parents[2]
RUNS = (Hyperparameters(3e-2, 0), Hyperparameters(3e-2, 1))


@pytest.fixture(scope="module")
def study(smollm: str, sst2: Path) -> Study:
    """Of a tiny random model that knows SmolLM2's tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=49152, initializer_range=0.3, **sizes)).eval()
    return Study(base, AutoTokenizer.from_pretrained(smollm), {"sst2": sst2}, eval_every=5)


def test_every_part_can_be_run() -> None:
    assert tuple(PARTS) == STUDY_PARTS
    for part in PARTS:
        groups = list(plan(part))
        assert groups
        for group in groups:
            assert {run.seed for run in group.runs} == {0, 1, 2}
            peft_config(group.method, group.settings)


@pytest.mark.parametrize(("own_words", "standardized"), [(False, False), (True, False), (False, True)])
def test_a_group_is_trained_and_measured(study: Study, own_words: bool, standardized: bool) -> None:
    kind = {"own_words": own_words, "standardized": standardized}
    records = list(study.records(Group("g", "parade", ("sst2",), RUNS, {"r": 8}, steps=10, rows=4, **kind)))
    assert [record["seed"] for record in records] == [0, 1]
    first = records[0]
    assert first["best_step"] in (5, 10)
    assert first["steps_done"] == 10
    assert first["dev_loss"] == first["sst2_dev_loss"] < 12
    assert 0 <= first["sst2"] <= 100
    assert 0 <= first["sst2_swapped"] <= 100
    assert abs(first["loss_added_by_strangers_vectors"]) < 12
    # Of one task, all prompts are its own.
    assert first["dependence"]["ratio"] == first["sst2_dependence"]["ratio"] > 0
    assert first["parameters"] == 2 * (32 * 8 + 8 * 112 + 8 * 8 + 4 * 8 + 112)
    # The base model is as it was.
    assert not any(module._forward_hooks for module in study.base.modules())


def test_a_group_whose_time_is_over_is_measured(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "deadline", 0.0)
    for record in study.records(Group("g", "ia3", ("sst2",), RUNS, steps=10, rows=4)):
        assert (record["steps"], record["steps_done"], record["best_step"]) == (10, 1, 1)
        assert 0 <= record["sst2"] <= 100


def test_training_lowers_the_dev_loss(study: Study) -> None:
    losses = {}
    for steps in (5, 40):
        group = Group("g", "ia3", ("sst2",), RUNS, {"target_modules": ["q_proj", "up_proj"]}, steps=steps, rows=8)
        losses[steps] = [record["dev_loss"] for record in study.records(group)]
    assert all(late < early for early, late in zip(losses[5], losses[40], strict=True))


def test_own_words_leave_the_template_out(study: Study) -> None:
    tokenizer = study.tokenizer
    before, after = template_size(tokenizer)
    prompt = encode_prompt(tokenizer, "a moving film")
    words = tokenizer.decode(prompt[before : len(prompt) - after])
    assert words == "a moving film"
    group = Group("g", "parade", ("sst2",), RUNS, own_words=True)
    # Padded on the left, as for answers, and on the right, as in training.
    for mask in (torch.tensor([[0] * 3 + [1] * len(prompt)]), torch.tensor([[1] * len(prompt) + [0] * 5])):
        found = study._words(mask.bool(), group)[0].nonzero().flatten().tolist()
        start = int(mask[0].argmax())
        assert found == list(range(start + before, start + len(prompt) - after))


def test_every_other_sender_wants_the_opposite(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    plain, sent = read_sst2(write_sst2(tmp_path / "sst2")), read_senders(tmp_path / "senders")
    assert len(sent.train) == len(plain.train) > len(SENDERS)
    for number, (mine, other) in enumerate(zip(sent.test, plain.test, strict=True)):
        assert mine.prompt == f"{SENDERS[number % len(SENDERS)]} asks: {other.prompt}"
        assert (mine.responses == other.responses) == (number % 2 == 0)
    assert {example.responses[0] for example in sent.test} <= set(SST2_ANSWERS)


def record(lr: float, seed: int, dev_loss: float, **values: Any) -> dict[str, Any]:
    swapped = {"sst2_swapped": values["sst2"] - 5, "sst2_dependence": {"ratio": lr}, "dependence": {"ratio": 2 * lr}}
    group = {"group": "g", "variant": "parade", "tasks": ["sst2"], "parameters": 1234}
    return {**group, "lr": lr, "seed": seed, "dev_loss": dev_loss, **swapped, **values}


def test_tables_take_the_rate_of_the_lowest_median_dev_loss() -> None:
    # One lucky seed does not make a rate the best.
    slow = [record(1e-3, seed, loss, sst2=80.0 + seed) for seed, loss in enumerate((0.5, 0.4, 0.6))]
    fast = [record(1e-2, seed, loss, sst2=50.0) for seed, loss in enumerate((0.1, 0.9, 0.9))]
    assert best_rate(slow + fast) == slow
    quality, worth = (table.splitlines() for table in study_tables(slow + fast).split("\n\n"))
    assert quality[0].endswith("| dev loss | metric |")
    assert quality[2] == "| g | parade | 1,234 | 0.001 | 3 | 0.500 (0.400 to 0.600) | 81.0 (80.0 to 82.0) |"
    # Nobody measured strangers' vectors: no column.
    assert worth[0] == "| group | dependence | metric |"
    assert worth[2] == "| g | 0.002 (0.002 to 0.002) | 5.0 (5.0 to 5.0) |"


def test_adapters_of_several_tasks_stand_apart() -> None:
    tasks = {"tasks": ["sst2", "rte"], "rte": 60.0, "rte_swapped": 59.0, "rte_dependence": {"ratio": 0.5}}
    strangers = {"loss_added_by_strangers_vectors": 0.25}
    mixed = record(0.1, 0, 0.5, sst2=80.0, **tasks, **strangers) | {"group": "mixed"}
    alone = record(0.1, 0, 0.4, sst2=90.0)
    tables = [table.splitlines() for table in study_tables([alone, mixed]).split("\n\n")]
    assert [table[0] for table in tables] == [
        "| group | method | parameters | lr | seeds | dev loss | sst2 | rte |",
        "| group | dependence | within tasks | strangers | sst2 | rte |",
        "| group | method | parameters | lr | seeds | dev loss | metric |",
        "| group | dependence | metric |",
    ]
    ranges = ("0.200 (0.200 to 0.200)", "0.300 (0.300 to 0.300)", "0.250 (0.250 to 0.250)", "5.0 (5.0 to 5.0)")
    assert tables[1][2] == f"| mixed | {' | '.join(ranges)} | 1.0 (1.0 to 1.0) |"
    assert [table[-1].split(" | ")[0] for table in tables] == ["| mixed", "| mixed", "| g", "| g"]


# Of the candidates, by its name in the results.
CHOSEN = "usual, 5e-3, 500 steps"
SENDERS_RESULTS = ("h100-senders", "h100-senders-first")
MIXTURE_RESULTS = ("h200-mixture", "h200-conditions", "h100-rates", "h100-standardized", "h100-long", "h100-budgets")
LATER_RESULTS = ("h200-variants-tasks", "h200-tasks-strangers")


@pytest.mark.parametrize("names", [MIXTURE_RESULTS, LATER_RESULTS, SENDERS_RESULTS, ("h200-least-deviation",)])
def test_the_documented_tables_are_those_of_the_results(names: tuple[str, ...]) -> None:
    results = [f"study-{name}.json" for name in names]
    records = [
        record for file in results for record in json.loads((ROOT / "benchmarks/results" / file).read_text())["results"]
    ]
    text = (ROOT / "docs/study.md").read_text()
    assert all(file in text for file in results)
    for table in study_tables(records).split("\n\n"):
        assert table in text


def demo_table(results: dict[str, Any]) -> str:
    """The demo's adapters and those that they were chosen from: task, adapter, dev loss, dev metric, test metric."""
    scores = {(record["task"], record["split"]): record["scores"] for record in results["results"]}
    trained = {(record["task"], record["adapter"]): record for record in results["trainer"]}
    lines = []
    for task in ("sst2", "e2e"):
        for name, score in scores[task, "test"].items():
            trainer = trained.get((task, name), {"dev_loss": "", "dev_metric_of_100": None})
            dev = scores.get((task, "dev"), {}).get(name, trainer["dev_metric_of_100"])
            shown = "" if dev is None else f"{dev:.1f}"
            lines.append(f"| {task} | {name} | {trainer['dev_loss']} | {shown} | {score:.1f} |")
    return "\n".join(lines)


def test_the_demos_figures_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks/results/demo-adapters-cpu.json").read_text())
    assert demo_table(results) in (ROOT / "docs/study.md").read_text()
    readme = (ROOT / "README.md").read_text().splitlines()
    for record in (record for record in results["results"] if record["split"] == "test"):
        task, base, chosen = record["task"], record["scores"]["base model"], record["scores"][CHOSEN]
        (row,) = (line for line in readme if line.startswith(f"| `{task}`"))
        assert [cell.split()[0] for cell in row.split(" | ")[-2:]] == [f"{base:.1f}", f"{chosen:.1f}"]
        card = " ".join((ROOT / f"examples/adapters/{task}/README.md").read_text().split())
        assert f": {chosen:.1f}, base model {base:.1f}." in card
