# SPDX-License-Identifier: Apache-2.0
"""The package's commands, run in this process."""

import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest


def refusal(main: Callable[[], None], *flags: object) -> str:
    """Run a command that must refuse its flags with exit code 1; return its one-line error."""
    with patch.object(sys, "argv", ["command", *map(str, flags)]), pytest.raises(SystemExit) as ended:
        main()
    # SystemExit with a string: Python prints it to stderr and exits with code 1.
    assert isinstance(ended.value.code, str)
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code
