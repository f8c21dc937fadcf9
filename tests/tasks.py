# SPDX-License-Identifier: Apache-2.0
"""A small task in SST-2's format."""

from itertools import product
from pathlib import Path

GOOD = ("moving", "funny", "clever", "warm", "gripping", "beautiful")
BAD = ("dull", "tedious", "loud", "clumsy", "lifeless", "messy")
NOUNS = ("film", "comedy", "drama", "story", "sequel", "picture")


def sentences() -> list[tuple[str, int]]:
    """Sentences with alternating labels."""
    pairs = [((good, 1), (bad, 0)) for good, bad in zip(GOOD, BAD, strict=True)]
    return [(f"a {word} {noun}", label) for noun, pair in product(NOUNS, pairs) for word, label in pair]


def write_sst2(folder: Path) -> Path:
    """Write 60 training, 8 dev and 4 test examples; return the folder."""
    rows = [f"{sentence}\t{label}" for sentence, label in sentences()]
    # One dev sentence is in the training file too; the reader must leave it out of training.
    for split, lines in {"train": rows[:60] + rows[60:61], "dev": rows[60:68], "test": rows[68:]}.items():
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "SOURCE.txt").write_text("data set: made up for a test\nlicence as stated: none\nnote: small\n")
    return folder
