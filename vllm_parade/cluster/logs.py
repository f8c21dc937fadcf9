# SPDX-License-Identifier: Apache-2.0
"""Keeps the log of a Serve replica working beside vLLM's.

vLLM configures logging when it is imported and when it creates an engine. Python then closes all existing handlers, and
the handler of the replica's log loses its file. A restarted controller asks each replica for the name of that file. If
the call fails, the controller takes the replica for broken and replaces its engine.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


@contextmanager
def kept(logger: str = "ray.serve") -> Iterator[None]:
    """Restore the targets of a logger's memory handlers on exit, if logging was configured inside the context."""
    handlers = [one for one in logging.getLogger(logger).handlers if isinstance(one, MemoryHandler)]
    targets = [handler.target for handler in handlers]
    try:
        yield
    finally:
        for handler, target in zip(handlers, targets, strict=True):
            handler.setTarget(target)
