# SPDX-License-Identifier: Apache-2.0
"""A replica's adapters after each version of the list, with the front end's real registry and fake workers."""

import asyncio
from types import SimpleNamespace

import pytest

from vllm_parade import ParadeRequest
from vllm_parade.cluster.entries import Entry, Snapshot
from vllm_parade.cluster.follower import Follower
from vllm_parade.config import AdditionalConfig, ParadeModule, ServingConfig
from vllm_parade.frontend.adapters import AdapterRegistry


class Engine:
    """An engine whose worker reads folders from `files`. A folder that is not in it is an error."""

    def __init__(self) -> None:
        config = AdditionalConfig({}, ServingConfig(True, max_parades=1, max_cpu_parades=4))
        self.input_processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=config))
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: False)
        self.files = {"/x/a": "hash a", "/x/b": "hash b"}
        self.reads: list[str] = []

    async def collective_rpc(self, method: str, args: tuple) -> list[dict]:
        self.reads.append(args[0])
        if args[0] not in self.files:
            return [{"ok": False, "error": "no such folder"}]
        return [{"ok": True, "content_hash": self.files[args[0]]}]


class Served:
    """A follower, and the adapters that its replica serves."""

    def __init__(self, **static: ParadeRequest) -> None:
        self.engine = Engine()
        self.models = SimpleNamespace(engine_client=self.engine, lora_requests=dict(static))
        self.follower = Follower(self.models)
        self.version = 0

    def apply(self, **contents: str | None) -> int:
        entries = {name: Entry(ParadeModule(name, f"/x/{name}"), content) for name, content in contents.items()}
        return self.send(Snapshot(self.version + 1, entries))

    def send(self, snapshot: Snapshot) -> int:
        self.version = snapshot.version
        read = asyncio.run(self.follower.apply(snapshot))
        assert self.follower.report.version == snapshot.version
        return read

    @property
    def names(self) -> set[str]:
        assert self.follower.num_served == len(self.models.lora_requests)
        return set(self.models.lora_requests)


@pytest.fixture
def served() -> Served:
    return Served()


def test_an_adapter_is_read_first_and_served_when_all_have_it(served: Served) -> None:
    assert served.apply(a=None) == 1
    assert served.names == set()
    assert served.follower.report.contents == {"a": "hash a"}
    assert served.apply(a="hash a") == 0
    assert served.names == {"a"}
    assert served.follower.report.contents == {}
    assert served.engine.reads == ["/x/a"]


def test_what_is_off_the_list_is_withdrawn_and_makes_room(served: Served) -> None:
    served.apply(a="hash a", b="hash b")
    registry = AdapterRegistry.of(served.engine.input_processor)
    assert len(registry._pinned) == 2
    served.apply(b="hash b")
    assert served.names == {"b"}
    assert registry._pinned == {("b", "/x/b")}


def test_a_name_can_move_to_another_folder(served: Served) -> None:
    served.apply(a="hash a")
    moved = {"a": Entry(ParadeModule("a", "/x/b"), "hash b")}
    served.send(Snapshot(2, moved))
    assert served.models.lora_requests["a"].path == "/x/b"


def test_an_adapter_that_cannot_be_loaded_stops_no_other(served: Served) -> None:
    del served.engine.files["/x/a"]
    served.apply(a="hash a", b="hash b")
    assert served.names == {"b"}
    assert served.follower.report.problems == {"a": "adapter 'a': no such folder"}
    # It is tried again, even if the list has not changed.
    served.engine.files["/x/a"] = "hash a"
    served.send(Snapshot(1, None))
    assert served.names == {"a", "b"}
    assert served.follower.report.problems == {}


def test_files_that_have_changed_are_not_served(served: Served) -> None:
    """Other replicas read the old files, so answers would depend on the replica."""
    served.apply(a="what others have")
    assert served.names == set()
    assert "differ from those that the other replicas read" in served.follower.report.problems["a"]


def test_modules_of_the_start_are_served_as_the_list_says() -> None:
    served = Served(a=ParadeRequest("a", "/x/a"))
    AdapterRegistry.of(served.engine.input_processor)._hashes["a", "/x/a"] = "hash a"
    assert served.names == set()
    assert served.apply(a=None) == 0
    assert served.follower.report.contents == {"a": "hash a"}
    served.apply(a="hash a")
    assert served.names == {"a"}
    assert served.engine.reads == []
