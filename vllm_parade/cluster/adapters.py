# SPDX-License-Identifier: Apache-2.0
"""The application's list of adapters, and how a change of it reaches every replica before it counts.

Each replica waits for the next version of the list, makes its engine's adapters those of the list, and reports what
became of it. A new adapter comes twice: first without content, when replicas read it but do not serve it; then, once
all have reported the same content, to be served. So an adapter that one of them refuses has never been served anywhere,
and when a load returns there is no replica that would answer 404.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vllm_parade.cluster.entries import Entry, Report, Snapshot
from vllm_parade.config import ParadeModule

# How long a change waits for the slowest replica, and how often it looks whether those it waits for are alive.
BARRIER_S = 60.0
LOOK_S = 0.5
# How long a replica waits for the next version before it asks again.
POLL_S = 10.0


class AdapterRefused(ValueError):
    """A change that cannot be made; the list is as before. The message says why and what to do."""


class UnknownAdapter(AdapterRefused):
    """A name that is not on the list."""


class NotConfirmed(RuntimeError):
    """A change that some replica has not confirmed in time; the message says which one, and what holds now."""


class AdapterList:
    """The list, its version and the replicas that follow it.

    Args:
        base_names: the base model's names, which no adapter may have
        save: called with the list before anybody hears of a change
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
        """Take a replica's report, and answer with the next version as soon as there is one."""
        new = replica not in self.replicas
        self.replicas[replica] = report
        if new:
            self.save(self)
        self._tell()
        with suppress(TimeoutError):
            await self._wait(lambda: self.version != report.version, self.poll_s)
        # The version may have changed in the very moment in which the time was up.
        return Snapshot(self.version, None if self.version == report.version else dict(self.entries))

    def leave(self, replica: str) -> None:
        """Forget a replica that takes no more requests."""
        if self.replicas.pop(replica, None) is not None:
            self.save(self)
        self._tell()

    async def forget_dead(self, replicas: Iterable[str]) -> None:
        """Forget those of these replicas whose process has ended."""
        names = list(replicas)
        for name, alive in zip(names, await asyncio.gather(*map(self.is_alive, names)), strict=True):
            if not alive:
                self.leave(name)

    async def load(self, module: ParadeModule) -> None:
        """Serve an adapter on all replicas; one that is served already is left as it is.

        Raises:
            AdapterRefused: the name is taken, or a replica cannot use the adapter; nothing has changed.
            NotConfirmed: a replica does not answer; the adapter is not served.
        """
        if module.name in self.base_names:
            raise AdapterRefused(f"{module.name!r} is the base model's name; give the adapter another")
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
        """Serve an adapter that was on the list before there was any replica, once the first has read it.

        Raises:
            AdapterRefused: replicas read different files; it is on the list no more.
        """
        while self.entries[name].content is None:
            await self._wait(lambda: any(name in one.contents for one in self.replicas.values()))
            try:
                await self._settle(name)
            except NotConfirmed:
                continue
            except AdapterRefused:
                self._set(name, None)
                raise

    async def unload(self, name: str) -> None:
        """Serve an adapter no longer; requests under way end as they began.

        Raises:
            UnknownAdapter: there is none of that name.
            AdapterRefused: it is still being loaded.
            NotConfirmed: a replica does not answer; everywhere else the adapter is withdrawn.
        """
        if name not in self.entries:
            raise UnknownAdapter(f"no adapter is called {name!r}; there are {', '.join(self.entries) or 'none'}")
        if self.entries[name].content is None:
            raise AdapterRefused(f"adapter {name!r} is being loaded; unload it when it is served")
        self._set(name, None)
        await self._confirm(f"adapter {name!r} is withdrawn everywhere else, and there as soon as it answers")

    def describe(self) -> dict[str, Any]:
        """Adapters and replicas in plain values, for people and dashboards."""
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
        """Let an entry be served, once every replica has read the same content."""
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
        """Return when all replicas have reported on this version of the list, or on a later one."""
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
            raise NotConfirmed(f"no replica is running; {meanwhile}. Try again when one is")

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Return as soon as the condition holds; TimeoutError where it does not in time."""
        async with asyncio.timeout(seconds):
            while not condition():
                await self._news.wait()
