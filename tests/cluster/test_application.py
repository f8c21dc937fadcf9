# SPDX-License-Identifier: Apache-2.0
"""The application on a real Ray with two real engines, asked with the official client and compared with one engine.

The tests run in this order on one application: the later ones end processes of it. They stand in one file, since the
application takes more than a minute to start.
"""

import asyncio
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

pytest.importorskip("ray.serve")

import ray
from ray import serve

from tests import clusters
from tests.clusters import Cluster, wait_until
from tests.engines import engine, greedy, prompts
from vllm_parade import ParadeRequest
from vllm_parade.cluster.adapters import AdapterRefused

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BASE = "smollm"
REPLICA = "x-parade-replica"
NAMES = ["sst2", "e2e", "rank8", "last"]
# Loaded while the application runs.
LATE = "strong"
LENGTHS = [5, 40, 17, 64, 9, 33, 25, 50, 12, 28, 7, 45]
LONG = 48

# (model, prompt, tokens to answer)
Question = tuple[str, list[int], int]


def questions(models: list[str], count: int, seed: int, tokens: int = 8) -> list[Question]:
    lengths = [length for length, _ in zip(cycle(LENGTHS), range(count), strict=False)]
    asked = prompts(lengths, seed=seed)
    return [(model, one["prompt_token_ids"], tokens) for model, one in zip(cycle(models), asked, strict=False)]


MIXED = questions([BASE, *NAMES], 60, seed=80)
STREAMS = questions([*NAMES, BASE], 30, seed=81, tokens=LONG)
PLAIN = questions([*NAMES, BASE], 6, seed=82, tokens=LONG)
FRESH = questions([LATE], 20, seed=83)


@pytest.fixture(scope="module")
def adapters(trained: dict[str, ParadeRequest], variants: dict[str, ParadeRequest]) -> dict[str, ParadeRequest]:
    return {**trained, **{name: variants[name] for name in ("rank8", "last", LATE)}}


@pytest.fixture(scope="module")
def right(smollm: str, adapters: dict[str, ParadeRequest]) -> dict[str, list[int]]:
    """Tokens that a single engine answers, by question."""
    asked = [*MIXED, *STREAMS, *PLAIN, *FRESH]
    with engine(smollm, enable_parade=True, max_num_seqs=32) as llm:
        inputs: Any = [{"prompt_token_ids": prompt} for _, prompt, _ in asked]
        params = [greedy(tokens) for _, _, tokens in asked]
        requests = [adapters.get(model) for model, _, _ in asked]
        answers = llm.generate(inputs, params, parade_request=requests, use_tqdm=False)
        plain = llm.generate(inputs[: len(MIXED)], params[: len(MIXED)], use_tqdm=False)
    told = {str(one): list(answer.outputs[0].token_ids) for one, answer in zip(asked, answers, strict=True)}
    changed = sum(list(answer.outputs[0].token_ids) != told[str(one)] for one, answer in zip(MIXED, plain, strict=True))
    # Answers of the base model must be told from those of the adapters.
    assert changed > 0.9 * sum(model != BASE for model, _, _ in MIXED)
    return told


@pytest.fixture(scope="module")
def app(smollm: str, adapters: dict[str, ParadeRequest], right: dict[str, list[int]]) -> Iterator[Cluster]:
    options = {
        "served_model_name": BASE,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "max_parade_rank": 32,
    }
    given = [f"{name}={adapters[name].path}" for name in NAMES]
    with clusters.cluster(model=smollm, engine=options, adapters=given, replicas=2) as app:
        yield app


class Answer:
    """What came of a question: its replica, its tokens, and how it ended."""

    replica = ""
    error: Exception | None = None

    def __init__(self) -> None:
        self.tokens: list[int] = []


async def ask(client: openai.AsyncOpenAI, question: Question, stream: bool, answer: Answer) -> Answer:
    model, prompt, tokens = question
    options: dict[str, Any] = {"extra_body": {"return_token_ids": True, "ignore_eos": True}, "stream": stream}
    create = client.completions.with_raw_response.create
    try:
        response = await create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, **options)
        answer.replica = response.headers[REPLICA]
        parsed: Any = response.parse()
        if stream:
            async for chunk in parsed:
                answer.tokens += [token for choice in chunk.choices for token in choice.token_ids or []]
        else:
            answer.tokens = parsed.choices[0].token_ids
    except openai.APIError as error:
        answer.error = error
    return answer


async def ask_all(url: str, asked: list[tuple[Question, bool]], answers: list[Answer], at_once: int = 99) -> None:
    """Ask all these, whether streamed or not, so many at once."""
    room = asyncio.Semaphore(at_once)

    async def one(client: openai.AsyncOpenAI, question: Question, stream: bool, answer: Answer) -> None:
        async with room:
            await ask(client, question, stream, answer)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        await asyncio.gather(*(one(client, *pair, answer) for pair, answer in zip(asked, answers, strict=True)))


def together(app: Cluster, asked: list[Question], at_once: int = 99) -> list[Answer]:
    """Answers to all these; every third is streamed."""
    answers = [Answer() for _ in asked]
    pairs = [(question, number % 3 == 0) for number, question in enumerate(asked)]
    asyncio.run(ask_all(app.url, pairs, answers, at_once))
    return answers


def check(asked: list[Question], answers: list[Answer], right: dict[str, list[int]]) -> None:
    for question, answer in zip(asked, answers, strict=True):
        assert answer.error is None, f"{question[0]}: {answer.error}"
        assert answer.tokens == right[str(question)], question[0]


def models_by_replica(app: Cluster, replicas: set[str]) -> dict[str, set[str]]:
    """Names that each of these replicas serves."""
    found: dict[str, set[str]] = {}

    def all_seen() -> bool:
        response = httpx.get(f"{app.url}/v1/models", timeout=30)
        found[response.headers[REPLICA]] = {card["id"] for card in response.json()["data"]}
        return found.keys() >= replicas

    wait_until(all_seen, 30, "every replica has been asked")
    return found


def test_mixed_requests_equal_a_single_engine(app: Cluster, right: dict[str, list[int]]) -> None:
    answers = together(app, MIXED)
    check(MIXED, answers, right)
    assert {answer.replica for answer in answers} == set(app.replicas())


def test_an_adapter_keeps_to_its_replica(app: Cluster, right: dict[str, list[int]]) -> None:
    """Few enough at once for no replica to be busy: chance alone would send half of them elsewhere."""
    asked = [question for question in MIXED if question[0] != BASE]
    answers = together(app, asked, at_once=4)
    check(asked, answers, right)
    where: dict[str, Counter[str]] = defaultdict(Counter)
    for (model, *_), answer in zip(asked, answers, strict=True):
        where[model][answer.replica] += 1
    hits = sum(counts.most_common(1)[0][1] for counts in where.values())
    assert hits >= 0.9 * len(asked), where


def test_chat_models_and_errors_are_those_of_one_server(app: Cluster, adapters: dict[str, ParadeRequest]) -> None:
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        cards = {card.id: card.to_dict() for card in client.models.list()}
        assert {name: cards[name]["parent"] for name in cards} == {BASE: None, **dict.fromkeys(NAMES, BASE)}
        assert cards["sst2"]["root"] == adapters["sst2"].path
        messages: Any = [{"role": "user", "content": "a gripping movie\nThe sentiment of the given sentence is:"}]
        asked: dict[str, Any] = {"model": "sst2", "messages": messages, "max_tokens": 8, "temperature": 0}
        assert client.chat.completions.create(**asked).choices[0].message.content == "positive"
        chunks = [chunk for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "positive"
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.completions.create(model="nobody", prompt="Hello")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model="sst2", prompt="Hello", max_tokens=-1)
    assert httpx.get(f"{app.url}/health", timeout=30).status_code == 200
    assert httpx.get(f"{app.url}/nowhere", timeout=30).status_code == 404


def test_a_loaded_adapter_is_served_at_once(
    app: Cluster, adapters: dict[str, ParadeRequest], right: dict[str, list[int]]
) -> None:
    response = app.load(LATE, adapters[LATE].path)
    answers = together(app, FRESH)
    assert response.status_code == 200, response.text
    check(FRESH, answers, right)
    # Again: nothing to do.
    assert app.load(LATE, adapters[LATE].path).status_code == 200


def test_a_replica_that_joins_later_serves_what_was_loaded(app: Cluster, right: dict[str, list[int]]) -> None:
    before = app.replicas()
    app.run(3)
    assert len(app.replicas()) == 3
    assert before.items() < app.replicas().items()
    (new,) = app.replicas().keys() - before.keys()
    assert models_by_replica(app, {new})[new] == {BASE, *NAMES, LATE}
    # More at once than two replicas take while a third has room.
    answers = together(app, [*FRESH, *FRESH])
    check([*FRESH, *FRESH], answers, right)
    assert new in {answer.replica for answer in answers}
    app.run(2)
    assert len(app.replicas()) == 2
    check(FRESH, together(app, FRESH), right)


def test_a_bad_adapter_is_refused_and_nothing_changes(
    app: Cluster, adapters: dict[str, ParadeRequest], tmp_path: Path
) -> None:
    before = app.names()
    path = adapters["sst2"].path
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
        response = httpx.post(f"{app.url}/v1/unload_parade_adapter", json={"name": "sst2"}, headers=headers, timeout=30)
        assert response.status_code == 401
    assert "sst2" in app.names()


def test_an_unloaded_adapter_is_gone_everywhere(app: Cluster, adapters: dict[str, ParadeRequest]) -> None:
    start = time.monotonic()
    assert app.unload("rank8").status_code == 200
    (answer,) = together(app, [MIXED[3]])
    assert time.monotonic() - start < 1
    assert MIXED[3][0] == "rank8"
    assert isinstance(answer.error, openai.NotFoundError)
    served = models_by_replica(app, set(app.replicas()))
    assert len(served) == 2
    assert all("rank8" not in names for names in served.values())
    # Back by way of the application's handle.
    handle = serve.get_app_handle(clusters.APPLICATION)
    handle.load.remote("rank8", adapters["rank8"].path).result(timeout_s=60)
    assert {"rank8"} < {adapter["name"] for adapter in handle.adapters.remote().result(timeout_s=60)["adapters"]}
    with pytest.raises(AdapterRefused, match="no adapter is called 'nobody'"):
        handle.unload.remote("nobody").result(timeout_s=60)


def tokens(app: Cluster) -> float:
    """Tokens that all engines have made so far, which Ray tells once a second."""
    values = re.findall(r"^ray_vllm_generation_tokens_total{.*} (\S+)$", app.metrics(), re.MULTILINE)
    return sum(map(float, values))


def test_a_client_that_goes_away_ends_its_request(app: Cluster) -> None:
    """Whether it had got something already or not."""

    def resting() -> bool:
        now = tokens(app)
        time.sleep(3)
        return tokens(app) == now

    wait_until(resting, 30, "all earlier tokens are told")
    before = tokens(app)
    body = {"model": "sst2", "prompt": "Hello", "max_tokens": 480, "ignore_eos": True}
    with httpx.stream("POST", f"{app.url}/v1/completions", json={**body, "stream": True}, timeout=30) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{app.url}/v1/completions", json=body, timeout=0.5)
    wait_until(resting, 30, "no engine works any more")
    assert 0 < tokens(app) - before < 480


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
            # Ray tells for a while what replicas counted that have left.
            tokens >= replicas
            and sum(map(float, rows)) > 0
            and affinity["hit"] > 0.8 * sum(affinity.values())
            and places >= {"home", "base"}
            and sum(map(float, loads)) > 0
        )

    wait_until(told, 30, "all counters are exported")


def test_a_replica_that_dies_takes_its_requests_along_and_no_others(app: Cluster, right: dict[str, list[int]]) -> None:
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
            assert answer.tokens == wanted, number
            continue
        # What had come until then was right; what follows says so.
        assert answer.tokens == wanted[: len(answer.tokens)]
        assert answer.replica in ("", victim), number
        assert "the replica that answered this request has failed; ask again" in str(answer.error)
        if not answer.replica:
            assert isinstance(answer.error, openai.InternalServerError)
            assert answer.error.status_code == 503
            assert answer.error.response.headers["retry-after"] == "1"
        lost[stream] += 1
    assert 0 < lost[True] < len(STREAMS)
    assert all(answer.error is not None for answer in answers if answer.replica == victim and len(answer.tokens) < LONG)
    wait_until(lambda: not any(map(psutil.Process.is_running, orphans)), 20, "the engine has ended with its replica")

    # Its requests are answered elsewhere meanwhile, and its successor knows what was loaded after the start.
    check(FRESH, together(app, FRESH), right)
    wait_until(lambda: len(app.replicas().keys() - before.keys()) == 1, clusters.START_TIMEOUT_S, "a new replica")
    (new,) = app.replicas().keys() - before.keys()
    wait_until(lambda: models_by_replica(app, {new}), clusters.START_TIMEOUT_S, "the new replica answers")
    assert models_by_replica(app, {new})[new] == {BASE, *NAMES, LATE}

    def takes_its_share() -> bool:
        # Each router hears of it in its own time.
        answers = together(app, [*FRESH, *MIXED])
        check([*FRESH, *MIXED], answers, right)
        return any(answer.replica == new for answer in answers[: len(FRESH)])

    wait_until(takes_its_share, 60, "the new replica takes its share")


def test_the_list_survives_coordinator_and_controller(
    app: Cluster, adapters: dict[str, ParadeRequest], right: dict[str, list[int]]
) -> None:
    before = app.replicas()
    assert app.unload("e2e").status_code == 200
    (coordinator,) = clusters.processes("ray::ServeReplica:parade:Coordinator")
    coordinator.kill()
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    # Replicas go on with what they have.
    check(FRESH, together(app, FRESH), right)
    wait_until(lambda: app.names() == {*NAMES, LATE} - {"e2e"}, 90, "the list is back, without what was unloaded")
    wait_until(lambda: app.load("e2e", adapters["e2e"].path).is_success, 90, "a load")
    answers = together(app, MIXED)
    check(MIXED, answers, right)
    # The same engines as before: none was replaced, and all follow the new coordinator.
    assert app.replicas() == before
    assert {answer.replica for answer in answers} == set(before)
