# SPDX-License-Identifier: Apache-2.0
"""The application on a real Ray with two real engines. OpenAI's client sends requests; one engine is the reference."""

import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

pytest.importorskip("ray.serve")

from ray import serve

from tests import clusters
from tests.clusters import CHANGE_TIMEOUT_S, Cluster, processes, wait_for_a_share, wait_until
from tests.questions import BASE, CHAT, FRESH, LATE, MESSAGES, MIXED, NAMES, REPLICA, TIMEOUT_S, Right, check, together
from vllm_parade import ParadeRequest
from vllm_parade.cluster.adapters import POLL_S, AdapterRefused

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_mixed_requests_equal_a_single_engine(app: Cluster, right: dict[str, Right]) -> None:
    answers = together(app.url, MIXED)
    check(MIXED, answers, right)
    assert {answer.replica for answer in answers} == set(app.replicas())


def test_a_busy_machine_does_not_starve_the_application(app: Cluster) -> None:
    """Its processes have the priority of the process that started Ray, not the lower one of Ray's workers."""
    ours = [one for name in ("Replica", "Ingress", "Coordinator") for one in processes(f"ServeReplica:parade:{name}")]
    ours += [one for pid in app.replicas().values() for one in psutil.Process(pid).children(recursive=True)]
    assert len(ours) >= 6
    usual = psutil.Process().nice()
    assert {process.nice() for process in ours} == {usual}
    # tests/clusters.py sets niceness 1 for Serve's proxies.
    assert {process.nice() for process in processes("ray::ProxyActor")} == {min(usual + 1, 19)}


def replicas_of_turns(app: Cluster, first: str) -> list[str]:
    """The replicas that answer three successive turns of a chat with the base model."""
    replicas, messages = [], [{"role": "user", "content": first}]
    for turn in ("w110", "w120", "w130"):
        body = {"model": BASE, "messages": messages, "max_tokens": 8, "ignore_eos": True}
        response = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=TIMEOUT_S).raise_for_status()
        replicas.append(response.headers[REPLICA])
        answer = response.json()["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return replicas


def test_an_adapter_keeps_to_its_replica(app: Cluster, right: dict[str, Right]) -> None:
    """Only four requests run at a time, so no replica is busy. Random routing would send half of them elsewhere."""
    asked = [question for question in MIXED if question[0] != BASE]
    answers = together(app.url, asked, at_once=4)
    check(asked, answers, right)
    where: dict[str, Counter[str]] = defaultdict(Counter)
    for (model, *_), answer in zip(asked, answers, strict=True):
        where[model][answer.replica] += 1
    hits = sum(counts.most_common(1)[0][1] for counts in where.values())
    assert hits >= 0.9 * len(asked), where
    # A chat keeps to its replica too. The other requests are too few to make a replica busy. With random routing, all
    # five chats would keep to their replicas in one run of a thousand.
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(together, app.url, MIXED, 2)
        chats = [replicas_of_turns(app, f"w{number} w200") for number in range(101, 106)]
        check(MIXED, others.result(), right)
    assert all(len(set(replicas)) == 1 for replicas in chats), chats


def test_chat_models_and_errors_are_those_of_one_server(
    app: Cluster, model: str, adapters: dict[str, ParadeRequest], right: dict[str, Right]
) -> None:
    from transformers import AutoTokenizer

    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        cards = {card.id: card.to_dict() for card in client.models.list()}
        assert {name: cards[name]["parent"] for name in cards} == {BASE: None, **dict.fromkeys(NAMES, BASE)}
        assert cards[NAMES[0]]["root"] == adapters[NAMES[0]].path
        words = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(right[str(CHAT)].tokens)
        asked: dict[str, Any] = {"model": CHAT[0], "messages": MESSAGES, "max_tokens": CHAT[2], "temperature": 0}
        asked["extra_body"] = {"ignore_eos": True}
        assert client.chat.completions.create(**asked).choices[0].message.content.split() == words
        chunks = [chunk for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).split() == words
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.completions.create(model="nobody", prompt="w100")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model=NAMES[0], prompt="w100", max_tokens=-1)
    assert httpx.get(f"{app.url}/health", timeout=TIMEOUT_S).status_code == 200
    assert httpx.get(f"{app.url}/nowhere", timeout=TIMEOUT_S).status_code == 404


def test_a_loaded_adapter_is_served_at_once(
    app: Cluster, adapters: dict[str, ParadeRequest], right: dict[str, Right]
) -> None:
    response = app.load(LATE, adapters[LATE].path)
    answers = together(app.url, FRESH)
    assert response.status_code == 200, response.text
    check(FRESH, answers, right)
    # Loading it again changes nothing.
    assert app.load(LATE, adapters[LATE].path).status_code == 200


@pytest.mark.nightly
def test_a_replica_that_joins_later_serves_what_was_loaded(app: Cluster, right: dict[str, Right]) -> None:
    """Nightly, because it starts an engine. In every run, the successor of a dead replica joins in the same way."""
    before = app.replicas()
    app.run(3)
    assert len(app.replicas()) == 3
    assert before.items() < app.replicas().items()
    (new,) = app.replicas().keys() - before.keys()
    assert app.models_by_replica({new})[new] == {BASE, *NAMES, LATE}
    wait_for_a_share(app, new, right)
    app.run(2)
    assert len(app.replicas()) == 2
    check(FRESH, together(app.url, FRESH), right)


def test_a_bad_adapter_is_refused_and_nothing_changes(
    app: Cluster, adapters: dict[str, ParadeRequest], tmp_path: Path
) -> None:
    before = app.names()
    path = adapters[NAMES[0]].path
    for name, folder, message in (
        ("bad", str(tmp_path / "nowhere"), "no such folder"),
        ("bad", "examples/adapters/sst2", "give an absolute one"),
        (BASE, path, "is the base model's name"),
        (LATE, path, f"is served from {adapters[LATE].path}; unload it first"),
    ):
        response = app.load(name, folder)
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]["message"]
    response = app.unload("bad")
    assert response.status_code == 404, response.text
    assert app.names() == before == {*NAMES, LATE}
    assert all(replica["current"] and not replica["problems"] for replica in app.state()["replicas"])


def test_only_administrators_change_adapters(app: Cluster) -> None:
    for headers in ({}, {"authorization": "Bearer guess"}):
        response = httpx.post(
            f"{app.url}/v1/unload_parade_adapter", json={"parade_name": NAMES[0]}, headers=headers, timeout=TIMEOUT_S
        )
        assert response.status_code == 401
    assert NAMES[0] in app.names()


def test_an_unloaded_adapter_is_gone_everywhere(app: Cluster, adapters: dict[str, ParadeRequest]) -> None:
    start = time.monotonic()
    assert app.unload("rank8").status_code == 200
    (answer,) = together(app.url, [next(question for question in MIXED if question[0] == "rank8")])
    # The coordinator notified the replicas: the next poll would have come later.
    assert time.monotonic() - start < POLL_S / 2
    assert isinstance(answer.error, openai.NotFoundError)
    served = app.models_by_replica(set(app.replicas()))
    assert len(served) == 2
    assert all("rank8" not in names for names in served.values())
    # Load it again through the application's handle.
    handle = serve.get_app_handle(clusters.APPLICATION)
    handle.load.remote("rank8", adapters["rank8"].path).result(timeout_s=TIMEOUT_S)
    assert {"rank8"} < {adapter["name"] for adapter in handle.adapters.remote().result(timeout_s=TIMEOUT_S)["adapters"]}
    with pytest.raises(AdapterRefused, match="no adapter is called 'nobody'"):
        handle.unload.remote("nobody").result(timeout_s=TIMEOUT_S)


def tokens(app: Cluster) -> float:
    """Tokens that all engines have generated so far. Ray updates this metric once a second."""
    values = re.findall(r"^ray_vllm_generation_tokens_total{.*} (\S+)$", app.metrics(), re.MULTILINE)
    return sum(map(float, values))


def test_a_client_that_goes_away_ends_its_request(app: Cluster) -> None:
    """The request ends both before and after its first token."""

    def resting() -> bool:
        now = tokens(app)
        time.sleep(5)
        return tokens(app) == now

    wait_until(resting, CHANGE_TIMEOUT_S, "all earlier tokens are told")
    before = tokens(app)
    length = 960
    body = {"model": NAMES[0], "prompt": "w100 w200", "max_tokens": length, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{app.url}/v1/completions", json={**body, "stream": True}, timeout=TIMEOUT_S
    ) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{app.url}/v1/completions", json=body, timeout=0.5)
    wait_until(lambda: tokens(app) > before, CHANGE_TIMEOUT_S, "the first tokens are told")
    wait_until(resting, CHANGE_TIMEOUT_S, "no engine works any more")
    assert tokens(app) - before < length


def test_metrics_tell_replicas_and_routes(app: Cluster) -> None:
    def told() -> bool:
        text = app.metrics()
        replicas = {name.rpartition("#")[2] for name in app.replicas()}
        tokens = set(re.findall(r'^ray_vllm_generation_tokens_total{.*ReplicaId="(\w+)"', text, re.MULTILINE))
        rows = re.findall(r"^ray_vllm_parade_row_misses_total{.*} (\S+)$", text, re.MULTILINE)
        affinity = {
            result: sum(float(value) for value in re.findall(rf'affinity_total{{.*"{result}".*}} (\S+)', text))
            for result in ("hit", "miss")
        }
        places = set(re.findall(r'ray_vllm_parade_routed_total{.*place="(\w+)"', text))
        loads = re.findall(r"^ray_vllm_parade_adapter_loads_total{.*} (\S+)$", text, re.MULTILINE)
        return bool(
            # For a while, Ray still exports the counters of replicas that have stopped.
            tokens >= replicas
            and sum(map(float, rows)) > 0
            and affinity["hit"] > 0.8 * sum(affinity.values())
            and places >= {"home", "base"}
            and sum(map(float, loads)) > 0
        )

    wait_until(told, CHANGE_TIMEOUT_S, "all counters are exported")
