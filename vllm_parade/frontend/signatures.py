# SPDX-License-Identifier: Apache-2.0
"""Read and replace arguments of wrapped methods by name, whether passed by position or by keyword."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=64)
def _position(function: Callable[..., Any], name: str) -> int:
    # The arguments of a wrapped method do not include self, the first parameter.
    return list(inspect.signature(function).parameters).index(name) - 1


def argument(wrapped: Any, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """The value of a wrapped method's argument. None if the caller left it out."""
    if name in kwargs:
        return kwargs[name]
    position = _position(wrapped.__func__, name)
    return args[position] if position < len(args) else None


def with_argument(
    wrapped: Any, args: tuple, kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a wrapped method with another value for `name`."""
    position = _position(wrapped.__func__, name)
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
