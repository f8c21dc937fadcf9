# SPDX-License-Identifier: Apache-2.0
"""Build conversations of two to six turns from data sets, as lines {"messages": [...]} for the trainer's --train_file.

    python -m tools.conversations --e2e e2e/devset.csv --sst2 sst2/train.tsv --output conversations.jsonl

No row of a data set is used twice, so a split of the conversations also splits the rows. A source ends when all its
rows are used. The same files, --rows and --seed give the same conversations. By source:

- `--alpaca` alpaca_en_demo.json: unrelated instructions, one a turn, as when a user changes the subject.
- `--gsm8k` train.jsonl: a problem and its solution. The next turn asks for the result alone, which is in the previous
  answer.
- `--e2e` devset.csv: the system message holds a reference, as a document before the first turn. The first turn asks for
  a review. Later turns ask for another review of the same place, or for one of the reference's values.
- `--sst2` train.tsv: a turn gives two sentences and asks for the sentiment of the second one. The next turn asks for
  the sentiment of the first one. The conversation does not state it: only the previous turn has the sentence.
"""

import argparse
import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

LEAST_TURNS, MOST_TURNS = 2, 6
SENTIMENTS = {"0": "negative", "1": "positive"}

Turns = list[tuple[str, str]]
"""Questions and answers."""


def alpaca(file: Path, chance: random.Random) -> Iterator[tuple[str, Turns]]:
    """Unrelated instructions."""
    rows = [row for row in json.loads(file.read_text(encoding="utf-8")) if row["output"].strip()]
    chance.shuffle(rows)
    pairs = [("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"].strip()) for row in rows]
    left = iter(pairs)
    while len(turns := list(islice(left, chance.randint(LEAST_TURNS, MOST_TURNS)))) >= LEAST_TURNS:
        yield "", turns


def gsm8k(file: Path, chance: random.Random) -> Iterator[tuple[str, Turns]]:
    """Problems, each followed by a question for the result alone."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chance.shuffle(rows)
    left = iter(rows)
    while problems := list(islice(left, chance.randint(LEAST_TURNS, MOST_TURNS) // 2)):
        turns: Turns = []
        for row in problems:
            steps, _, result = re.sub("<<.*?>>", "", row["answer"]).partition("\n#### ")
            solution = f"{steps}\nThe answer is {result}."
            turns += [(row["question"], solution), ("Give only the number.", result)]
        yield "", turns


def e2e(file: Path, chance: random.Random) -> Iterator[tuple[str, Turns]]:
    """A reference as the system message, a review, and questions about both."""
    reviews: dict[str, list[str]] = {}
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            reviews.setdefault(row["mr"], []).append(row["ref"].strip())
    references = list(reviews)
    chance.shuffle(references)
    for reference in references:
        texts, values = list(dict.fromkeys(reviews[reference])), re.findall(r"(\w+)\[(.*?)\]", reference)
        chance.shuffle(texts)
        more = [("Write another review.", text) for text in texts[1:]]
        more += [(f"What is the {name} in the reference?", value) for name, value in values]
        chance.shuffle(more)
        count = chance.randint(LEAST_TURNS, MOST_TURNS)
        turns = [("Generate a customer review following the given reference.", texts[0]), *more[: count - 1]]
        yield f"Reference:\n{reference}", turns


def sst2(file: Path, chance: random.Random) -> Iterator[tuple[str, Turns]]:
    """Two sentences, a question for the sentiment of the second one, then one for that of the first one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    chance.shuffle(lines)
    left = iter([line.rsplit("\t", 1) for line in lines])
    while len(sentences := list(islice(left, 2 * chance.randint(1, MOST_TURNS // 2)))) >= 2:
        turns: Turns = []
        for (first, one), (second, other) in zip(sentences[::2], sentences[1::2], strict=False):
            question = f"{first.strip()}\n{second.strip()}\nThe sentiment of the second sentence is:"
            turns += [(question, SENTIMENTS[other]), ("And the one before?", SENTIMENTS[one])]
        yield "", turns


SOURCES: dict[str, Callable[[Path, random.Random], Iterator[tuple[str, Turns]]]] = {
    "alpaca": alpaca,
    "gsm8k": gsm8k,
    "e2e": e2e,
    "sst2": sst2,
}


def messages(system: str, turns: Turns) -> list[dict[str, str]]:
    """A conversation in the trainer's format."""
    said = [("system", system)] if system else []
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in said]


def build(files: dict[str, Path], rows: int, seed: int) -> list[list[dict[str, str]]]:
    """Conversations of all sources, mixed.

    Args:
        files: data files by source name
        rows: largest number of conversations of each source
        seed: seed of all random choices
    """
    found = []
    for name, file in files.items():
        made = SOURCES[name](file, random.Random(f"{seed} {name}"))
        found += [messages(*conversation) for conversation in islice(made, rows)]
    random.Random(seed).shuffle(found)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name}", type=Path, help=source.__doc__)
    parser.add_argument("--rows", type=int, default=1000, help="conversations of each source; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    files = {name: getattr(args, name) for name in SOURCES if getattr(args, name)}
    if not files:
        parser.error(f"give the file of at least one source: {', '.join(f'--{name}' for name in SOURCES)}")
    lines = [json.dumps({"messages": one}, ensure_ascii=False) for one in build(files, args.rows, args.seed)]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
