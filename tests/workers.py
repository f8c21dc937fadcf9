"""Groups of tests for pytest-xdist: tests that share an engine run on one worker, and long groups start first."""

from typing import Any

import pytest

# Files of a group share an engine, an application, or the process that others are forked from. Every other file is its
# own group.
FORKS = ("tests/e2e/test_async.py", "tests/e2e/test_parallel.py")
GROUPS = {
    "tests/cluster/test_application": "application",
    "tests/e2e/smollm/": "smollm",
    **dict.fromkeys(FORKS, "forks"),
}
# The longest groups start first, so that one worker does not wait for another at the end.
FIRST = ("application", "tests/e2e/test_server.py", "smollm", "forks", "tests/e2e/", "tests/train/")


def group(test: str) -> str:
    """The group of a test, by its id."""
    return next((name for start, name in GROUPS.items() if test.startswith(start)), test.partition("::")[0])


def rank(test: str) -> int:
    """The rank of a test's group; longer groups have lower ranks and start earlier."""
    return next((number for number, start in enumerate(FIRST) if group(test).startswith(start)), len(FIRST))


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler for these groups."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    # By default, xdist starts with the groups that have the most tests.
    config.option.loadscopereorder = False
    return GroupScheduling(config, log)
