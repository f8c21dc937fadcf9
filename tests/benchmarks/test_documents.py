# SPDX-License-Identifier: Apache-2.0
"""The benchmark commands in the docs: those that show results run, and the parser accepts those that measure."""

from pathlib import Path

import pytest

from benchmarks.__main__ import parser
from tests.documents import ROOT, blocks, commands, texts

PAGE = "docs/performance.md"
PREFIX = ["python", "-m", "benchmarks"]


def test_the_commands_that_show_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    name = "tests/benchmarks/test_documents.py::test_the_commands_that_show_results"
    (text,) = texts(PAGE, name, "bash")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    for words in commands(text):
        assert words[:3] == PREFIX
        args = parser().parse_args(words[3:])
        args.function(args)
    assert "| 1 | 274 | lora | 7.598 | 1.304 |" in capsys.readouterr().out
    assert list((tmp_path / "pictures").glob("decode_*.png"))


@pytest.mark.parametrize("page", [PAGE, "docs/study.md", "benchmarks/study/README.md"])
def test_commands_that_measure_are_known(page: str) -> None:
    (text,) = [block.text for block in blocks(page) if block.names == ("gpu",)]
    for words in commands(text, MODEL="model", DATA="data"):
        assert words[:3] == PREFIX
        parser().parse_args(words[3:])
