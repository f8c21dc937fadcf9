# SPDX-License-Identifier: Apache-2.0
"""Death of the application's processes: a replica, the coordinator, Serve's controller."""

import asyncio
from collections import Counter

import openai
import psutil
import pytest

pytest.importorskip("ray.serve")

import ray

from tests import clusters
from tests.clusters import CHANGE_TIMEOUT_S, START_TIMEOUT_S, Cluster, wait_for_a_share, wait_until
from tests.questions import (
    BASE,
    FRESH,
    LATE,
    LONG,
    MIXED,
    NAMES,
    PLAIN,
    STREAMS,
    Answer,
    Right,
    ask_all,
    check,
    together,
)
from vllm_parade import ParadeRequest

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_replica_that_dies_takes_its_requests_along_and_no_others(app: Cluster, right: dict[str, Right]) -> None:
    before = app.replicas()
    victim = next(iter(before))
    orphans = psutil.Process(before[victim]).children(recursive=True)
    assert orphans
    asked = [*((question, True) for question in STREAMS), *((question, False) for question in PLAIN)]
    answers = [Answer() for _ in asked]

    async def kill_while_they_run() -> None:
        running = asyncio.ensure_future(ask_all(app.url, asked, answers))
        streams = answers[: len(STREAMS)]
        while not (all(one.tokens for one in streams if one.replica) and sum(bool(one.tokens) for one in streams) > 20):
            assert not running.done()
            await asyncio.sleep(0.05)
        psutil.Process(before[victim]).kill()
        await running

    asyncio.run(kill_while_they_run())
    lost = Counter()
    for number, ((question, stream), answer) in enumerate(zip(asked, answers, strict=True)):
        wanted = right[str(question)]
        if answer.error is None:
            assert wanted.equals(answer.tokens), number
            continue
        # The tokens before the failure are right, and an error follows them.
        assert wanted.begins_with(answer.tokens)
        assert answer.replica in ("", victim), number
        assert "the replica that answered this request has failed; ask again" in str(answer.error)
        if not answer.replica:
            assert isinstance(answer.error, openai.InternalServerError)
            assert answer.error.status_code == 503
            assert answer.error.response.headers["retry-after"] == "1"
        lost[stream] += 1
    assert 0 < lost[True] < len(STREAMS)
    assert all(answer.error is not None for answer in answers if answer.replica == victim and len(answer.tokens) < LONG)
    wait_until(lambda: not any(map(psutil.Process.is_running, orphans)), CHANGE_TIMEOUT_S, "the engine has ended too")

    # Meanwhile the other replica answers. The successor also serves adapters that were loaded after the start.
    check(FRESH, together(app.url, FRESH), right)
    wait_until(lambda: len(app.replicas().keys() - before.keys()) == 1, START_TIMEOUT_S, "a new replica")
    (new,) = app.replicas().keys() - before.keys()
    assert app.models_by_replica({new})[new] == {BASE, *NAMES, LATE}
    wait_for_a_share(app, new, right)


def test_the_list_survives_coordinator_and_controller(
    app: Cluster, adapters: dict[str, ParadeRequest], right: dict[str, Right]
) -> None:
    before = app.replicas()
    assert app.unload("last").status_code == 200
    (coordinator,) = clusters.processes("ray::ServeReplica:parade:Coordinator")
    coordinator.kill()
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    # Replicas keep serving their adapters.
    check(FRESH, together(app.url, FRESH), right)
    left = {*NAMES, LATE} - {"last"}
    wait_until(lambda: app.names() == left, CHANGE_TIMEOUT_S, "the list is back, without what was unloaded")
    wait_until(lambda: app.load("last", adapters["last"].path).is_success, CHANGE_TIMEOUT_S, "a load")
    answers = together(app.url, MIXED)
    check(MIXED, answers, right)
    # No engine was replaced, and all replicas follow the new coordinator.
    assert app.replicas() == before
    assert {answer.replica for answer in answers} == set(before)


def test_a_replica_that_is_stopped_leaves_the_others_as_they_are(app: Cluster, right: dict[str, Right]) -> None:
    before = app.replicas()
    # Deploy again unchanged, then with one replica less.
    app.run(2)
    assert app.replicas() == before
    app.run(1)
    assert len(app.replicas()) == 1
    assert app.replicas().items() < before.items()
    check(FRESH, together(app.url, FRESH), right)
