# SPDX-License-Identifier: Apache-2.0
"""Messages between the application's list of adapters and its replicas."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_parade.config import ParadeModule


@dataclass(frozen=True)
class Entry:
    """An adapter on the list."""

    module: ParadeModule
    content: str | None = None
    """Content hash that all replicas have reported; None while they read the adapter and do not serve it yet."""


@dataclass(frozen=True)
class Snapshot:
    """One version of the list."""

    version: int
    entries: Mapping[str, Entry] | None
    """By name; None if the replica already has this version."""


@dataclass(frozen=True)
class Report:
    """A replica's result of applying a version of the list."""

    version: int = -1
    contents: Mapping[str, str] = field(default_factory=dict)
    """Content hashes of the adapters that have none on the list."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Adapters that the replica could not load, with the error message."""
    host: str = ""
    """Host name of the replica's machine."""
    pid: int = 0
    """Process id of the replica on that machine."""
