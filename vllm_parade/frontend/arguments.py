# SPDX-License-Identifier: Apache-2.0
"""PARADE's command-line flags and keywords of `LLM(...)`, both stored in `additional_config["parade"]`.

`EngineArgs` takes no fields from plugins, and spawned server processes receive the parsed flags before they load any
plugin. The field `additional_config` reaches all of them.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from vllm_parade import compat
from vllm_parade.adapter.config import SITES
from vllm_parade.config import CONFIG_KEY, ServingConfig, ServingConfigError, flag_name

KNOBS = tuple(field.name for field in fields(ServingConfig))
# Marks options from a command line: their errors end the process with one line instead of a traceback.
COMMAND_LINE = "command_line"


def accept_keywords(wrapped: Callable[..., None], instance: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Wraps EngineArgs.__init__: move PARADE's keywords into `additional_config`."""
    given = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
    if given:
        # This seam is installed on import, before any version check. On an unsupported vLLM, the keywords would be
        # ignored.
        version = compat.installed_version()
        if not compat.is_supported(version):
            raise ServingConfigError(compat.unsupported_message(version))
        additional = dict(kwargs.get("additional_config") or {})
        kwargs["additional_config"] = {**additional, CONFIG_KEY: {**additional.get(CONFIG_KEY, {}), **given}}
    wrapped(*args, **kwargs)


class _FoldKnob(argparse.Action):
    """Store a flag's value in `additional_config["parade"]`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = True if self.nargs == 0 else values
        _fold(namespace, {self.dest: value, COMMAND_LINE: True})


def _fold(namespace: argparse.Namespace, knobs: dict[str, Any]) -> None:
    additional = dict(getattr(namespace, "additional_config", None) or {})
    namespace.additional_config = {**additional, CONFIG_KEY: {**additional.get(CONFIG_KEY, {}), **knobs}}


class _MergeAdditionalConfig(argparse.Action):
    """Makes `--additional-config` keep the values of PARADE's flags, in any order of flags."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        folded = (getattr(namespace, "additional_config", None) or {}).get(CONFIG_KEY)
        namespace.additional_config = dict(values)
        if folded:
            _fold(namespace, folded)


def add_flags(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wraps EngineArgs.add_cli_args: add the ParadeConfig group."""
    # Imported here, because this module may be imported while vllm.config is still being imported.
    from vllm.config.utils import get_attr_docs

    parser = wrapped(*args, **kwargs)
    group = parser.add_argument_group(
        title="ParadeConfig",
        description="Serve PARADE adapters (prompt-aware representation adjustment) together with the base model.",
    )
    options: dict[str, dict[str, Any]] = {
        "enable_parade": {"nargs": 0},
        "parade_modules": {"nargs": "+", "metavar": "NAME=PATH"},
        "max_parades": {"type": int},
        "max_cpu_parades": {"type": int},
        "max_parade_rank": {"type": int},
        "parade_vector_cache": {"type": int},
        "parade_sites": {"nargs": "+", "choices": SITES},
    }
    docs = get_attr_docs(ServingConfig)
    for name, option in options.items():
        text = _help(docs[name], ServingConfig.__dataclass_fields__[name].default)
        group.add_argument(flag_name(name), action=_FoldKnob, dest=name, default=argparse.SUPPRESS, help=text, **option)
    _merge_additional_config(parser._actions)
    return parser


def _help(docstring: str, default: Any) -> str:
    text = " ".join(docstring.split())
    return text if default in (None, (), False) else f"{text} (default: {default})"


def _merge_additional_config(actions: Sequence[argparse.Action]) -> None:
    for action in actions:
        if "--additional-config" in action.option_strings:
            action.__class__ = type("MergeAdditionalConfig", (_MergeAdditionalConfig, type(action)), {})
