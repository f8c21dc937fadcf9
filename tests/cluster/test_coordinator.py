# SPDX-License-Identifier: Apache-2.0
"""What the coordinator restores after its death and after a new deployment, with a fake of Ray's key-value store."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from vllm_parade.cluster import coordinator as module
from vllm_parade.cluster.coordinator import Coordinator
from vllm_parade.cluster.entries import Entry, Report
from vllm_parade.config import ParadeModule


class Store(dict):
    """Fake of Ray's key-value store. It outlives all coordinators of a test."""

    def _internal_kv_get(self, key: bytes, namespace: bytes) -> bytes | None:
        return self.get((namespace, key))

    def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> None:
        assert overwrite
        self[namespace, key] = value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(module, "internal_kv", store)
    monkeypatch.setattr(module.serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    return store


def adapter(name: str, folder: str = "/x") -> ParadeModule:
    return ParadeModule(name, f"{folder}/{name}")


async def start(*given: ParadeModule) -> Coordinator:
    """A new coordinator that replaces the previous one."""
    made = object.__new__(Coordinator)
    await Coordinator.__init__(made, given, ["base"])
    return made


def serve_all(coordinator: Coordinator) -> None:
    """Mark all adapters as served, as if a replica had read them."""
    for name, entry in list(coordinator.adapters.entries.items()):
        coordinator.adapters._set(name, Entry(entry.module, f"content of {entry.module.path}"))


def known(coordinator: Coordinator) -> dict[str, tuple[str, bool]]:
    """Path of each adapter, and whether it is served."""
    entries = coordinator.adapters.entries.items()
    return {name: (entry.module.path, entry.content is not None) for name, entry in entries}


def test_adapters_of_the_start_wait_for_the_first_replica(store: Store) -> None:
    async def scenario() -> None:
        coordinator = await start(adapter("a"), adapter("b"))
        assert known(coordinator) == {"a": ("/x/a", False), "b": ("/x/b", False)}
        assert await coordinator.modules() == [adapter("a"), adapter("b")]
        report = Report()
        while not all(content for _, content in known(coordinator).values()):
            snapshot = await coordinator.poll("one", report)
            report = Report(snapshot.version, {"a": "1", "b": "2"})
        assert {name: entry.content for name, entry in coordinator.adapters.entries.items()} == {"a": "1", "b": "2"}
        assert await coordinator.modules() == []
        for task in coordinator.settling:
            task.cancel()

    asyncio.run(scenario())


def test_what_was_loaded_and_unloaded_outlives_the_coordinator(store: Store) -> None:
    async def scenario() -> None:
        first = await start(adapter("a"), adapter("b"))
        serve_all(first)
        first.adapters._set("late", Entry(adapter("late"), "content"))
        first.adapters._set("a", None)
        # It is still loading when the coordinator dies, and its client gets an error. It is not restored.
        first.adapters._set("half", Entry(adapter("half")))
        first.adapters.replicas["one"] = Report(7)
        first.adapters.save(first.adapters)
        second = await start(adapter("a"), adapter("b"))
        assert known(second) == {"b": ("/x/b", True), "late": ("/x/late", True)}
        assert second.adapters.version > first.adapters.version
        # Replicas report their versions again.
        assert second.adapters.replicas == {"one": Report()}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([adapter("a"), adapter("new")], {"a": ("/x/a", True), "new": ("/x/new", False), "late": ("/x/late", True)}),
        ([], {"late": ("/x/late", True)}),
        ([adapter("a", "/y")], {"a": ("/y/a", False), "late": ("/x/late", True)}),
        ([adapter("a"), adapter("late", "/y")], {"a": ("/x/a", True), "late": ("/x/late", True)}),
    ],
    ids=["one more", "none any more", "moved", "one that was loaded by hand"],
)
def test_a_new_deployment_changes_what_its_arguments_changed(store: Store, given: list[Any], wanted: dict) -> None:
    async def scenario() -> None:
        first = await start(adapter("a"))
        serve_all(first)
        first.adapters._set("late", Entry(adapter("late"), "content"))
        assert known(await start(*given)) == wanted

    asyncio.run(scenario())


def test_adapters_that_nobody_had_read_yet_are_still_those_of_the_start(store: Store) -> None:
    async def scenario() -> None:
        await start(adapter("a"))
        assert known(await start(adapter("a"))) == {"a": ("/x/a", False)}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("answer", "alive"), [(None, True), (ValueError("no such actor"), False), (TimeoutError(), True)]
)
def test_only_rays_word_counts_as_death(store: Store, monkeypatch, answer: Exception | None, alive: bool) -> None:
    async def reply() -> None:
        if isinstance(answer, TimeoutError):
            raise answer

    def get_actor(name: str, namespace: str) -> Any:
        assert namespace == "serve"
        if isinstance(answer, ValueError):
            raise answer
        return SimpleNamespace(__ray_ready__=SimpleNamespace(remote=reply))

    async def scenario() -> None:
        coordinator = await start()
        assert await coordinator._is_alive("one") is alive

    monkeypatch.setattr(module.ray, "get_actor", get_actor)
    asyncio.run(scenario())
