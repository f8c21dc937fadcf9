"""Which tests run on which of pytest-xdist's workers: those that share an engine on one, and the longest first."""

from typing import Any

import pytest

# Test files of a group share an engine, an application, or the process that others are forks of. Every other file is a
# group of its own.
FORKS = ("tests/e2e/test_async.py", "tests/e2e/test_parallel.py")
GROUPS = {
    "tests/cluster/test_application": "application",
    "tests/e2e/smollm/": "smollm",
    **dict.fromkeys(FORKS, "forks"),
}
# The longest groups, which start first. Of two workers, one must not wait for the other at the end.
FIRST = ("application", "tests/e2e/test_server.py", "smollm", "forks", "tests/e2e/", "tests/train/")


def group(test: str) -> str:
    """The group of a test, by its id."""
    return next((name for start, name in GROUPS.items() if test.startswith(start)), test.partition("::")[0])


def rank(test: str) -> int:
    """The longer a test's group takes, the lower."""
    return next((number for number, start in enumerate(FIRST) if group(test).startswith(start)), len(FIRST))


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler for these groups."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    # It would start with the groups that have the most tests.
    config.option.loadscopereorder = False
    return GroupScheduling(config, log)
