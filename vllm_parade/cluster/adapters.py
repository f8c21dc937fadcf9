# SPDX-License-Identifier: Apache-2.0
"""The application's list of adapters, and the barrier that applies each change on all replicas.

Each replica polls for the next version of the list, loads and unloads adapters in its engine to match it, and reports
the result. A new adapter is published twice. The first version has no content hash: replicas read the adapter but do
not serve it. The second follows once all replicas have reported the same hash: they serve it. So an adapter that one
replica refuses is never served, and no replica answers 404 after a load has returned.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vllm_parade.cluster.entries import Entry, Report, Snapshot
from vllm_parade.config import ParadeModule

# Timeout of a change, and the interval at which it checks that late replicas are alive.
BARRIER_S = 60.0
LOOK_S = 0.5
# Timeout of a replica's poll for the next version.
POLL_S = 10.0


class AdapterRefused(ValueError):
    """A change was refused and the list is unchanged. The message names the reason and the remedy."""


class UnknownAdapter(AdapterRefused):
    """The name is not on the list."""


class NotConfirmed(RuntimeError):
    """A replica has not confirmed a change in time. The message names the replica and the adapter's current state."""


class AdapterList:
    """The list, its version and the replicas that follow it.

    Args:
        base_names: names of the base model; adapters cannot use them
        save: called with the list after each change, before replicas are notified
        is_alive: whether a replica's process may still answer requests
    """

    def __init__(
        self,
        base_names: Iterable[str],
        save: Callable[["AdapterList"], None],
        is_alive: Callable[[str], Awaitable[bool]],
        barrier_s: float = BARRIER_S,
        poll_s: float = POLL_S,
    ) -> None:
        self.base_names, self.save, self.is_alive = frozenset(base_names), save, is_alive
        self.barrier_s, self.poll_s = barrier_s, poll_s
        self.version = 0
        self.entries: dict[str, Entry] = {}
        self.replicas: dict[str, Report] = {}
        self._news = asyncio.Event()

    async def poll(self, replica: str, report: Report) -> Snapshot:
        """Store a replica's report, and return the next version as soon as it exists."""
        new = replica not in self.replicas
        self.replicas[replica] = report
        if new:
            self.save(self)
        self._tell()
        with suppress(TimeoutError):
            await self._wait(lambda: self.version != report.version, self.poll_s)
        # The version may have changed just as the timeout expired.
        return Snapshot(self.version, None if self.version == report.version else dict(self.entries))

    def leave(self, replica: str) -> None:
        """Remove a replica that takes no more requests."""
        if self.replicas.pop(replica, None) is not None:
            self.save(self)
        self._tell()

    async def forget_dead(self, replicas: Iterable[str]) -> None:
        """Remove the given replicas whose process has ended."""
        names = list(replicas)
        for name, alive in zip(names, await asyncio.gather(*map(self.is_alive, names)), strict=True):
            if not alive:
                self.leave(name)

    async def load(self, module: ParadeModule) -> None:
        """Serve an adapter on all replicas. Does nothing if the same adapter is already served.

        Raises:
            AdapterRefused: the name is taken, or a replica cannot use the adapter; nothing has changed.
            NotConfirmed: a replica does not answer; the adapter is not served.
        """
        if module.name in self.base_names:
            raise AdapterRefused(f"{module.name!r} is the base model's name; give the adapter another name")
        known = self.entries.get(module.name)
        if known is not None and known.module == module and known.content is not None:
            return
        if known is not None:
            state = "being loaded" if known.content is None else "served"
            raise AdapterRefused(
                f"{module.name!r} is {state} from {known.module.path}; unload it first, or give another name"
            )
        self._set(module.name, Entry(module))
        try:
            await self._settle(module.name)
        except BaseException:
            self._set(module.name, None)
            raise

    async def settle_when_read(self, name: str) -> None:
        """Serve an adapter that was listed before the first replica started, once a replica has read it.

        Raises:
            AdapterRefused: a replica cannot use the adapter, or replicas read different files. The adapter is removed.
        """
        # Nothing is left to do if the adapter is removed in the meantime.
        while (entry := self.entries.get(name)) is not None and entry.content is None:
            await self._wait(lambda: any(name in one.contents for one in self.replicas.values()))
            try:
                await self._settle(name)
            except NotConfirmed:
                continue
            except AdapterRefused:
                self._set(name, None)
                raise

    async def unload(self, name: str) -> None:
        """Stop serving an adapter. Running requests finish with it.

        Raises:
            UnknownAdapter: no adapter has that name.
            AdapterRefused: it is still being loaded.
            NotConfirmed: a replica does not answer; all others have withdrawn the adapter.
        """
        if name not in self.entries:
            raise UnknownAdapter(f"no adapter is called {name!r}; loaded adapters: {', '.join(self.entries) or 'none'}")
        if self.entries[name].content is None:
            raise AdapterRefused(f"adapter {name!r} is being loaded; unload it once it is served")
        self._set(name, None)
        await self._confirm(f"adapter {name!r} is withdrawn everywhere else; this replica follows when it answers")

    def describe(self) -> dict[str, Any]:
        """The adapters and replicas as JSON-serializable values."""
        adapters = [
            {**vars(entry.module), "content": entry.content, "served": entry.content is not None}
            for entry in self.entries.values()
        ]
        replicas = [
            {
                "name": name,
                "host": report.host,
                "pid": report.pid,
                "current": report.version == self.version,
                "problems": dict(report.problems),
            }
            for name, report in self.replicas.items()
        ]
        return {"version": self.version, "adapters": adapters, "replicas": replicas}

    async def _settle(self, name: str) -> None:
        """Publish an entry for serving once all replicas have read the same content."""
        meanwhile = f"adapter {name!r} is not served"
        await self._confirm(meanwhile)
        reports = list(self.replicas.values())
        for report in reports:
            if name in report.problems:
                raise AdapterRefused(report.problems[name])
        contents = {report.contents.get(name) for report in reports}
        content = contents.pop()
        if contents or content is None:
            raise AdapterRefused(
                f"adapter {name!r}: replicas read different files in {self.entries[name].module.path}; put the same "
                "files on all machines, under a path that has not been used before"
            )
        self._set(name, replace(self.entries[name], content=content))
        await self._confirm(meanwhile)

    def _set(self, name: str, entry: Entry | None) -> None:
        self.entries.pop(name, None)
        if entry is not None:
            self.entries[name] = entry
        self.version += 1
        self.save(self)
        self._tell()

    async def _confirm(self, meanwhile: str) -> None:
        """Wait until all replicas have reported this version of the list or a later one."""
        version, end = self.version, time.monotonic() + self.barrier_s

        def late() -> list[str]:
            return [name for name, report in self.replicas.items() if report.version < version]

        while late():
            try:
                await self._wait(lambda: not late(), LOOK_S)
            except TimeoutError:
                await self.forget_dead(late())
                if late() and time.monotonic() > end:
                    message = f"{late()[0]} has not answered within {self.barrier_s:g} s; {meanwhile}"
                    raise NotConfirmed(message) from None
        if not self.replicas:
            raise NotConfirmed(f"no replica is running; {meanwhile}. Try again when one is running")

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait until the condition holds; raises TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds):
            while not condition():
                await self._news.wait()
