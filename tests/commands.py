# SPDX-License-Identifier: Apache-2.0
"""The package's commands, run in this process."""

import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest


def refusal(main: Callable[[], None], *flags: object) -> str:
    """The line with which a command refuses its flags, exit code 1."""
    with patch.object(sys, "argv", ["command", *map(str, flags)]), pytest.raises(SystemExit) as ended:
        main()
    # Python prints a text to stderr and exits with 1.
    assert isinstance(ended.value.code, str)
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code
