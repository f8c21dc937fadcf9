# SPDX-License-Identifier: Apache-2.0
"""Serve's log beside vLLM's.

vLLM configures logging when it is loaded and when it makes an engine, and Python then closes all handlers that there
are. The one through which Serve's replicas write their log forgets its file; and a controller that has been restarted,
which asks each replica for the name of that file, takes the failure for a broken replica and replaces every engine.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


@contextmanager
def kept(logger: str = "ray.serve") -> Iterator[None]:
    """Keep a logger's handlers in working order, whatever is configured meanwhile."""
    handlers = [one for one in logging.getLogger(logger).handlers if isinstance(one, MemoryHandler)]
    targets = [handler.target for handler in handlers]
    try:
        yield
    finally:
        for handler, target in zip(handlers, targets, strict=True):
            handler.setTarget(target)
