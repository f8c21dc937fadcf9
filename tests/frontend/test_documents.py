# SPDX-License-Identifier: Apache-2.0
"""The command in docs/serving.md gives an engine's config with vLLM's own parser."""

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.documents import ROOT, commands, texts
from vllm_parade.config import ParadeModule, ServingConfig
from vllm_parade.plugin import register

PAGE = "docs/serving.md"


def test_the_servers_command(smollm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.chdir(ROOT)
    (text,) = texts(PAGE, "tests/frontend/test_documents.py::test_the_servers_command", "bash")
    ((vllm, serve, *words),) = commands(text, MODEL=smollm)
    assert (vllm, serve) == ("vllm", "serve")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    args.model = args.model_tag
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert ServingConfig.from_vllm_config(config).parade_modules == (
        ParadeModule("sst2", "examples/adapters/sst2"),
        ParadeModule("e2e", "examples/adapters/e2e", "SmolLM2-135M-Instruct"),
    )
