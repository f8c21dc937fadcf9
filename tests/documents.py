# SPDX-License-Identifier: Apache-2.0
"""Code blocks of the documentation pages, for tests that run them unchanged.

A comment before a block names the tests that run it: `<!-- runs: tests/x.py::test_y, .ci/run -->`. If no
test runs the block, the comment names what it needs: `<!-- needs: gpu -->`, `<!-- needs: cluster -->`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/study/README.md",
    "benchmarks/study/TABLES.md",
    "patches/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
BLOCK = re.compile(r"(?:^<!-- ([a-z]+): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block."""

    page: str
    mark: str
    """`runs`, `needs` or empty."""
    names: tuple[str, ...]
    """Names after the mark: tests or needs."""
    language: str
    text: str


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    """All code blocks of a page."""
    for mark, names, language, text in BLOCK.findall(read(page)):
        yield Block(page, mark, tuple(name.strip() for name in names.split(",")) if names else (), language, text)


def texts(page: str, test: str, language: str) -> list[str]:
    """Texts of the blocks that a test runs; at least one must exist."""
    found = [one.text for one in blocks(page) if test in one.names and one.language == language]
    assert found, f"{page} has no {language} block that {test} runs"
    return found


def commands(text: str, **variables: str) -> list[list[str]]:
    """The words of each command in a bash block, with `$NAME` replaced and comments removed."""
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]
