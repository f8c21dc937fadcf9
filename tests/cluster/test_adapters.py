# SPDX-License-Identifier: Apache-2.0
"""The list of adapters and its barrier, with simulated replicas."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from vllm_parade.cluster import adapters as module
from vllm_parade.cluster.adapters import AdapterList, AdapterRefused, NotConfirmed, UnknownAdapter
from vllm_parade.cluster.entries import Entry, Report, Snapshot
from vllm_parade.config import ParadeModule

BASE = "base"
A, B = ParadeModule("a", "/x/a"), ParadeModule("b", "/x/b")


class Replica:
    """Follows a list as a real replica does. The test sets when its reads finish."""

    def __init__(self, listed: AdapterList, name: str) -> None:
        self.listed, self.name = listed, name
        self.files: dict[str, str] = {}
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.served: set[str] = set()
        self.seen: list[set[str]] = []
        self.entries: dict[str, Entry] = {}
        self.report = Report()
        self.task = asyncio.ensure_future(self.follow())

    async def follow(self) -> None:
        while True:
            snapshot: Snapshot = await self.listed.poll(self.name, self.report)
            await self.may_read.wait()
            self.entries = self.entries if snapshot.entries is None else dict(snapshot.entries)
            contents = {
                name: self.files.get(entry.module.path, "same")
                for name, entry in self.entries.items()
                if entry.content is None
            }
            problems = {name: f"{name} is bad" for name, content in contents.items() if content == "bad"}
            self.served = {name for name, entry in self.entries.items() if entry.content is not None}
            self.seen.append(self.served)
            good = {name: content for name, content in contents.items() if name not in problems}
            self.report = Report(snapshot.version, good, problems)


class World:
    """A list, its replicas, and the states that it saved."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, set[str], list[str]]] = []
        self.dead: set[str] = set()
        self.listed = AdapterList([BASE], self.save, self.is_alive, barrier_s=0.3, poll_s=0.05)
        self.replicas: list[Replica] = []

    def save(self, listed: AdapterList) -> None:
        self.saved.append((listed.version, set(listed.entries), list(listed.replicas)))

    async def is_alive(self, name: str) -> bool:
        return name not in self.dead

    async def add(self, count: int) -> list[Replica]:
        self.replicas += [Replica(self.listed, f"replica{len(self.replicas) + number}") for number in range(count)]
        await asyncio.sleep(0.01)
        return self.replicas


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    monkeypatch.setattr(module, "LOOK_S", 0.02)

    def play(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def run() -> None:
            world = World()
            try:
                await asyncio.wait_for(scenario(world), 20)
            finally:
                for replica in world.replicas:
                    replica.task.cancel()

        asyncio.run(run())

    return play


def test_a_loaded_adapter_is_served_everywhere_when_load_returns(play) -> None:
    async def scenario(world: World) -> None:
        replicas = await world.add(3)
        await world.listed.load(A)
        assert [replica.served for replica in replicas] == [{"a"}] * 3
        await world.listed.unload("a")
        assert [replica.served for replica in replicas] == [set()] * 3

    play(scenario)


def test_nobody_serves_what_somebody_has_not_read(play) -> None:
    async def scenario(world: World) -> None:
        first, slow = await world.add(2)
        slow.may_read.clear()
        load = asyncio.ensure_future(world.listed.load(A))
        await asyncio.sleep(0.1)
        assert first.served == set()
        assert not load.done()
        slow.may_read.set()
        await load
        assert first.served == slow.served == {"a"}

    play(scenario)


@pytest.mark.parametrize(("file", "message"), [("bad", "a is bad"), ("other", "replicas read different files in /x/a")])
def test_what_one_replica_refuses_was_never_served(play, file: str, message: str) -> None:
    async def scenario(world: World) -> None:
        _, odd = await world.add(2)
        await world.listed.load(B)
        odd.files["/x/a"] = file
        with pytest.raises(AdapterRefused, match=message):
            await world.listed.load(A)
        await asyncio.sleep(0.05)
        assert all("a" not in served for replica in world.replicas for served in replica.seen)
        assert list(world.listed.entries) == ["b"]
        # With the right files, the adapter loads.
        odd.files["/x/a"] = "same"
        await world.listed.load(A)
        assert odd.served == {"a", "b"}

    play(scenario)


def test_names_are_refused_that_are_taken(play) -> None:
    async def scenario(world: World) -> None:
        await world.add(1)
        with pytest.raises(AdapterRefused, match="'base' is the base model's name"):
            await world.listed.load(ParadeModule(BASE, "/x"))
        await world.listed.load(A)
        version = world.listed.version
        await world.listed.load(A)
        assert world.listed.version == version
        with pytest.raises(AdapterRefused, match=r"'a' is served from /x/a; unload it first"):
            await world.listed.load(ParadeModule("a", "/y"))
        with pytest.raises(UnknownAdapter, match=r"no adapter is called 'b'; loaded adapters: a"):
            await world.listed.unload("b")

    play(scenario)


def test_a_name_is_loaded_once_at_a_time(play) -> None:
    async def scenario(world: World) -> None:
        (replica,) = await world.add(1)
        replica.may_read.clear()
        load = asyncio.ensure_future(world.listed.load(A))
        await asyncio.sleep(0)
        with pytest.raises(AdapterRefused, match="'a' is being loaded"):
            await world.listed.load(A)
        with pytest.raises(AdapterRefused, match="'a' is being loaded"):
            await world.listed.unload("a")
        replica.may_read.set()
        await load

    play(scenario)


def test_many_are_loaded_at_once(play) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.add(2)
        second.files["/x/7"] = "bad"
        loads = [world.listed.load(ParadeModule(str(number), f"/x/{number}")) for number in range(20)]
        results = await asyncio.gather(*loads, return_exceptions=True)
        assert [number for number, result in enumerate(results) if result is not None] == [7]
        assert first.served == second.served == {str(number) for number in range(20) if number != 7}

    play(scenario)


def test_a_replica_that_is_dead_is_not_waited_for(play) -> None:
    async def scenario(world: World) -> None:
        _, victim = await world.add(2)
        victim.task.cancel()
        world.dead.add(victim.name)
        await world.listed.load(A)
        assert list(world.listed.replicas) == ["replica0"]

    play(scenario)


def test_a_replica_that_does_not_answer_stops_a_load_but_no_unload(play) -> None:
    async def scenario(world: World) -> None:
        first, mute = await world.add(2)
        await world.listed.load(B)
        mute.may_read.clear()
        with pytest.raises(NotConfirmed, match="replica1 has not answered within 0.3 s; adapter 'a' is not served"):
            await world.listed.load(A)
        assert list(world.listed.entries) == ["b"]
        with pytest.raises(NotConfirmed, match="adapter 'b' is withdrawn everywhere else"):
            await world.listed.unload("b")
        assert first.served == set()
        mute.may_read.set()
        await asyncio.sleep(0.1)
        assert mute.served == set()

    play(scenario)


def test_without_a_replica_nothing_is_loaded(play) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(NotConfirmed, match="no replica is running; adapter 'a' is not served. Try again"):
            await world.listed.load(A)
        assert world.listed.entries == {}

    play(scenario)


def test_replicas_that_come_later_catch_up(play) -> None:
    async def scenario(world: World) -> None:
        await world.add(1)
        await world.listed.load(A)
        await world.listed.load(B)
        late = (await world.add(1))[-1]
        assert late.served == {"a", "b"}
        world.listed.leave("replica0")
        world.replicas[0].task.cancel()
        await world.listed.unload("a")
        assert late.served == {"b"}

    play(scenario)


def test_adapters_from_the_start_are_served_when_the_first_replica_has_read_them(play) -> None:
    async def scenario(world: World) -> None:
        world.listed.entries = {"a": Entry(A)}
        settling = asyncio.ensure_future(world.listed.settle_when_read("a"))
        await asyncio.sleep(0.05)
        assert not settling.done()
        (replica,) = await world.add(1)
        await settling
        assert replica.served == {"a"}
        assert world.listed.entries["a"].content == "same"

    play(scenario)


def test_an_adapter_from_the_start_may_be_removed_before_a_replica_has_read_it(play) -> None:
    """A new deployment that no longer names the adapter removes it."""

    async def scenario(world: World) -> None:
        world.listed.entries = {"a": Entry(A)}
        settling = asyncio.ensure_future(world.listed.settle_when_read("a"))
        world.listed.entries = {}
        await settling
        assert world.listed.entries == {}

    play(scenario)


def test_every_change_is_saved_before_it_is_told(play) -> None:
    async def scenario(world: World) -> None:
        await world.add(2)
        assert world.saved[-1] == (0, set(), ["replica0", "replica1"])
        await world.listed.load(A)
        # Version 1: all replicas read it. Version 2: all serve it.
        assert [saved[:2] for saved in world.saved[-2:]] == [(1, {"a"}), (2, {"a"})]
        await world.listed.unload("a")
        assert world.saved[-1][:2] == (3, set())

    play(scenario)


def test_the_list_is_described(play) -> None:
    async def scenario(world: World) -> None:
        await world.add(1)
        await world.listed.load(A)
        described = world.listed.describe()
        assert described["adapters"] == [
            {"name": "a", "path": "/x/a", "base_model_name": None, "content": "same", "served": True}
        ]
        (replica,) = described["replicas"]
        assert (replica["name"], replica["current"], replica["problems"]) == ("replica0", True, {})

    play(scenario)
