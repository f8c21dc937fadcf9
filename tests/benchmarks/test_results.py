# SPDX-License-Identifier: Apache-2.0
"""Result files and the pages that cite them."""

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
