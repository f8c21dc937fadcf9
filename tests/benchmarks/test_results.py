# SPDX-License-Identifier: Apache-2.0
"""Result files and the pages that cite them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
FILES = sorted(file for folder in ROOT.glob("benchmarks/**/results") for file in folder.iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_result_file_is_cited(file: Path) -> None:
    cited = [page for page in PAGES if file.name in page.read_text(encoding="utf-8")]
    assert cited, f"no page says what {file.relative_to(ROOT)} is: cite it or delete it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_cited_path_exists(page: Path) -> None:
    for path in re.findall(r"(?<![\w/])benchmarks/[\w./-]+\.\w+", page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path


def test_forty_conversations_compute_what_blocks_leave_uncached() -> None:
    """No variant can compute fewer tokens: only full blocks of 16 tokens are cached."""
    content = json.loads((ROOT / "benchmarks/results/llama3-8b-h200-crowd.json").read_text(encoding="utf-8"))
    (record,) = (one for one in content["results"] if one["workload"] == "conversations")
    turn = record["asked"] + record["answered"]
    # An answer's last token is in no cache when the next message comes.
    cached = [max(0, number * turn - 1) // 16 * 16 for number in range(record["turns"])]
    computed = [number * turn + record["asked"] - known for number, known in enumerate(cached)]
    assert record["computed_tokens"] == record["conversations"] * sum(computed)
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert f"{record['computed_tokens']:,} prompt tokens" in page
    assert f"{record['rows']} rows" in page
