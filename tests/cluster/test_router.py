# SPDX-License-Identifier: Apache-2.0
"""Serve's router with our rule: the replicas that it chooses and its counters. Replicas are fakes; Ray does not run."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from vllm_parade.cluster.asgi import ClientRequest
from vllm_parade.cluster.router import AffinityRouter, adapter_of, conversation_of
from vllm_parade.cluster.routing import FREE, AffinityRule

SLOTS, RESIDENT = 8, 2
NAMES = ["one", "two", "three"]


class Counts(dict):
    """Stands in for a Ray counter."""

    def inc(self, tags: dict[str, str]) -> None:
        (value,) = tags.values()
        self[value] = self.get(value, 0) + 1


def request(adapter: str | None, conversation: bytes | None = None) -> Any:
    asked = ClientRequest("POST", "/", b"", [], b"", adapter, conversation)
    return SimpleNamespace(args=[asked], routing_context=SimpleNamespace(should_backoff=False))


class Router(AffinityRouter):
    """A router with fake replicas and counters."""

    def __init__(self) -> None:
        deployment, source = DeploymentID("Replica", "app"), DeploymentHandleSource.REPLICA
        super().__init__(deployment, source, use_replica_queue_len_cache=True)
        self.initialize_state(SLOTS, RESIDENT)
        self.routed, self.affinity, self.conversations = Counts(), Counts(), Counts()
        self.set(NAMES)

    def set(self, names: list[str]) -> None:
        self.ids = {name: ReplicaID(name, self._deployment_id) for name in names}
        self._replicas = {one: SimpleNamespace(replica_id=one) for one in self.ids.values()}

    def load(self, name: str, count: int) -> None:
        self.replica_queue_len_cache.update(self.ids[name], count)

    def ranks(self, adapter: str | None, conversation: bytes | None = None) -> list[str]:
        asked = request(adapter, conversation)
        ranks = asyncio.run(self.choose_replicas(list(self.curr_replicas.values()), asked))
        assert asked.routing_context.should_backoff
        return [replica.replica_id.unique_id for (replica,) in ranks]

    def route(self, adapter: str | None, conversation: bytes | None = None) -> str:
        name = self.ranks(adapter, conversation)[0]
        self.on_request_routed(request(adapter, conversation), self.ids[name], None)
        return name


@pytest.fixture
def router() -> Router:
    return Router()


def test_an_adapter_goes_where_the_rule_says(router: Router) -> None:
    rule = AffinityRule(NAMES, SLOTS)
    for adapter in map(str, range(20)):
        first, second, _ = (NAMES[place] for place in rule.order(adapter))
        router.load(first, 0)
        assert router.ranks(adapter)[0] == first
        router.load(first, FREE)
        assert router.ranks(adapter)[0] == second
        router.load(first, 0)


def test_the_others_follow_by_their_load(router: Router) -> None:
    home = router.ranks("a")[0]
    others = [name for name in NAMES if name != home]
    router.load(others[0], 3)
    router.load(others[1], 1)
    assert router.ranks("a") == [home, others[1], others[0]]


def test_base_requests_go_to_the_less_busy(router: Router) -> None:
    router.load("one", 5)
    router.load("two", 5)
    counts = [router.route(None) for _ in range(100)]
    # The less busy of two random replicas gets the request: the idle one, whenever it is drawn.
    assert counts.count("three") > 35
    assert router.routed == {"base": 100}
    assert router.affinity == {}


def test_places_are_counted_by_where_requests_went(router: Router) -> None:
    home = router.route("a")
    router.load(home, FREE)
    router.route("a")
    assert router.routed == {"home": 1, "spread": 1}


def test_a_hit_is_a_request_whose_replica_has_its_adapter(router: Router) -> None:
    home = router.ids[router.ranks("a")[0]]
    for adapter in ("a", "a", "b", "a", "c", "b"):
        router.on_request_routed(request(adapter), home, None)
    # The device holds two adapters: "c" evicted "b".
    assert router.affinity == {"miss": 4, "hit": 2}


def test_a_replica_that_goes_is_forgotten_and_its_adapters_move(router: Router) -> None:
    home = router.route("a")
    router.set([name for name in NAMES if name != home])
    second = router.route("a")
    assert second != home
    assert router.affinity == {"miss": 2}
    assert set(router.recent) == set(NAMES) - {home}
    assert router.route("a") == second
    assert router.affinity == {"miss": 2, "hit": 1}


def test_a_conversation_stays_where_it_went_while_loads_change(router: Router) -> None:
    home = router.ranks("a")[0]
    router.load(home, FREE)
    first = router.route("a", b"talk")
    assert first != home
    # The adapter's first replica has room again, but the other one has the conversation's keys and values.
    router.load(home, 0)
    router.load(first, FREE - 1)
    assert [router.route("a", b"talk") for _ in range(3)] == [first] * 3
    assert router.route("a", b"other") == router.route("a") == home
    router.load(first, FREE)
    assert router.route("a", b"talk") == home
    # The router remembers the replica of the latest turn.
    router.load(first, 0)
    assert router.route("a", b"talk") == home
    assert router.conversations == {"new": 2, "kept": 4, "moved": 1}
    assert router.routed == {"spread": 4, "home": 4}


def test_conversations_with_the_base_model_stay_too(router: Router) -> None:
    first = router.route(None, b"talk")
    router.load(first, FREE - 1)
    assert {router.route(None, b"talk") for _ in range(30)} == {first}
    assert router.conversations == {"new": 1, "kept": 30}
    assert router.routed == {"base": 31}


def test_a_conversation_whose_replica_has_gone_moves(router: Router) -> None:
    home = router.route("a", b"talk")
    router.set([name for name in NAMES if name != home])
    second = router.route("a", b"talk")
    assert second != home
    router.set(NAMES)
    assert router.route("a", b"talk") == second
    assert router.conversations == {"new": 1, "moved": 1, "kept": 1}


def test_the_longest_silent_conversation_is_forgotten(router: Router) -> None:
    router.max_places = 2
    for conversation in (b"one", b"two", b"one", b"three"):
        router.route("a", conversation)
    assert list(router.places) == [b"one", b"three"]
    router.route("a", b"two")
    assert router.conversations == {"new": 4, "kept": 1}
    # Requests without a conversation are not remembered.
    router.route("a")
    assert list(router.places) == [b"three", b"two"]


def test_requests_without_an_adapter_are_the_base_models() -> None:
    assert adapter_of(None) is None
    assert adapter_of(SimpleNamespace(args=[])) is None
    assert adapter_of(SimpleNamespace(args=["other"])) is None
    assert adapter_of(request("a")) == "a"
    assert conversation_of(None) is conversation_of(SimpleNamespace(args=["other"])) is None
    assert conversation_of(request("a", b"talk")) == b"talk"
