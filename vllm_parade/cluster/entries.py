# SPDX-License-Identifier: Apache-2.0
"""What travels between the application's list of adapters and the replicas that follow it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_parade.config import ParadeModule


@dataclass(frozen=True)
class Entry:
    """An adapter on the list."""

    module: ParadeModule
    content: str | None = None
    """Content hash that the replicas agreed on; None while they read it and nobody serves it yet."""


@dataclass(frozen=True)
class Snapshot:
    """The list at one moment."""

    version: int
    entries: Mapping[str, Entry] | None
    """By name; None where the reader has this version already."""


@dataclass(frozen=True)
class Report:
    """What a replica made of a version of the list."""

    version: int = -1
    contents: Mapping[str, str] = field(default_factory=dict)
    """Content hashes of the adapters that are on the list without one."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Adapters that the replica could not load, with the reason."""
    host: str = ""
    """Name of the replica's machine."""
    pid: int = 0
    """The replica's process on that machine."""
