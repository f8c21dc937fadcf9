# SPDX-License-Identifier: Apache-2.0
"""The page on the adapter format: its config is valid, and its check runs."""

import json

import pytest

from tests.documents import ROOT, texts
from vllm_parade.adapter import AdapterConfig, load_adapter

PAGE = "docs/adapter-format.md"
HERE = "tests/adapter/test_documents.py"


def test_the_config_of_the_page() -> None:
    (text,) = texts(PAGE, f"{HERE}::test_the_config_of_the_page", "json")
    config = AdapterConfig.from_dict(json.loads(text))
    assert (config.r, config.num_capsules, config.sites) == (12, 4, ("q", "v", "up"))


def test_the_check_of_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = texts(PAGE, f"{HERE}::test_the_check_of_the_page", "python")
    monkeypatch.chdir(ROOT)
    exec(text, {})
    adapter = load_adapter("examples/adapters/sst2")
    assert capsys.readouterr().out == f"12 {adapter.num_parameters} {adapter.content_hash}\n"
