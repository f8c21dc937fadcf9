# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server without its socket: arguments, engine and app."""

import json
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.plugins import load_general_plugins
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from vllm_parade.config import CONFIG_KEY
from vllm_parade.frontend.arguments import COMMAND_LINE


def parse(options: Mapping[str, Any]) -> Namespace:
    """Parse flags of `vllm serve`, given as names with underscores or hyphens and their values.

    Raises:
        ValueError: vLLM's parser refuses a flag; the message is the parser's.
    """
    load_general_plugins()
    parser = make_arg_parser(FlexibleArgumentParser())

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"engine: {message}")

    parser.error = refuse
    args = parser.parse_args([word for name, value in options.items() for word in flag(name, value)])
    # Without this entry, a bad PARADE flag raises an exception, which Serve reports, instead of exiting the process.
    args.additional_config.get(CONFIG_KEY, {}).pop(COMMAND_LINE, None)
    validate_parsed_serve_args(args)
    validate_api_server_args(args)
    return args


def flag(name: str, value: Any) -> list[str]:
    """A flag and its value as command-line arguments; empty for None."""
    words = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{words}" if value else f"--no-{words}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{words}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]


@asynccontextmanager
async def serving(args: Namespace) -> AsyncIterator[FastAPI]:
    """Start an engine whose metrics go to Ray's exporter, and yield its app. Both stop when the context exits."""
    engine_args = AsyncEngineArgs.from_cli_args(args)
    usage = UsageContext.OPENAI_API_SERVER
    engine = AsyncLLM.from_vllm_config(
        engine_args.create_engine_config(usage_context=usage),
        usage_context=usage,
        stat_loggers=[RayPrometheusStatLogger],
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        # vLLM's error handler stops its HTTP server when the engine dies. Here, Serve's health check detects that.
        app.state.server = SimpleNamespace(should_exit=False)
        async with app.router.lifespan_context(app):
            yield app
    finally:
        engine.shutdown()
