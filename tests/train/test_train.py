"""examples/train.py from data to a served folder, and the reading and scoring of its tasks."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_parade.adapter import load_adapter
from vllm_parade.train.tasks import TASKS, Example
from vllm_parade.train.templates import e2e_prompt, sst2_prompt

ROOT = Path(__file__).parents[2]
SENTENCES = [
    "a moving and funny film",
    "two hours of nothing",
    "a joy from start to finish",
    "dull , loud and far too long",
    "warm , clever and beautifully played",
    "a mess that never finds its feet",
    "one of the best of the year",
    "it wastes everyone 's time",
]


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    folder = tmp_path / "sst2"
    folder.mkdir()
    rows = [f"{sentence}\t{(number + 1) % 2}" for number, sentence in enumerate(SENTENCES)]
    # The first training sentence stands in dev too.
    for split, lines in {"train": rows[:6] + rows[6:7], "dev": rows[6:7] + rows[7:], "test": rows[7:]}.items():
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_sst2_is_read_without_what_is_held_out(sst2: Path) -> None:
    splits = TASKS["sst2"].load(sst2)
    assert [example.prompt for example in splits.train] == [sst2_prompt(sentence) for sentence in SENTENCES[:6]]
    assert splits.train[0].responses == ("positive",)
    assert splits.test[0].responses == ("negative",)


def test_e2e_is_split_by_meaning(tmp_path: Path) -> None:
    for name, meanings in {"devset.csv": 300, "testset_w_refs.csv": 2}.items():
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for number in range(meanings):
                for text in ("first", "second"):
                    writer.writerow([f"name[{name} {number}]", f"{text} of {number}"])
    splits = TASKS["e2e"].load(tmp_path)
    assert len(splits.train) == 200
    assert len(splits.dev) == 100
    assert not {example.prompt for example in splits.train} & {example.prompt for example in splits.dev}
    assert splits.test[1] == Example(e2e_prompt("name[testset_w_refs.csv 1]"), ("first of 1", "second of 1"))


def test_scores() -> None:
    examples = [Example("p", ("positive",)), Example("p", ("negative",)), Example("p", ("positive",))]
    assert TASKS["sst2"].metric(["Positive.", "It is negative", " positive"], examples) == pytest.approx(200 / 3)
    review = [Example("p", ("the pub is cheap", "a cheap pub by the river"))]
    assert TASKS["e2e"].metric(["a cheap pub by the river"], review) == pytest.approx(100)
    assert 0 < TASKS["e2e"].metric(["the pub"], review) < 100


@pytest.mark.engine
def test_script_trains_measures_and_writes_an_adapter(sst2: Path, smollm: str, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    options = ["--steps", "2", "--batch-size", "2", "--eval-every", "1", "--model", smollm]
    command = [sys.executable, "examples/train.py", "--task", "sst2", "--data", str(sst2), "--output", str(output)]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    adapter = load_adapter(output)
    assert len(adapter.generators) == 30
    # Two steps move the bias away from one.
    assert (adapter.generators[0].bias != 1).any()
    card = (output / "README.md").read_text()
    assert "| dev | 2 | likeliest |" in card
