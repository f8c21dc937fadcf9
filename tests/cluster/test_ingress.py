# SPDX-License-Identifier: Apache-2.0
"""Responses of the ingress, also when a replica fails before or after the first body bytes. Replicas are fakes."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from fastapi import HTTPException, Request, Response
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from tests.documents import commands, texts
from vllm_parade.cluster.adapters import AdapterRefused, NotConfirmed, UnknownAdapter
from vllm_parade.cluster.ingress import Ingress, LoadBody, UnloadBody, administrator, conversation, fields, routes

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]
LOST = "the replica that answered this request has failed; ask again"


def start(headers: list[tuple[bytes, bytes]] = JSON, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": True}


class Answer:
    """A replica's answer. Each step is a list of messages, or an exception to raise."""

    def __init__(self, *steps: Any) -> None:
        self.steps, self.cancelled = list(steps), False

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Any:
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


def make(answer: Any = None, coordinator: Any = None) -> tuple[Any, list[Any]]:
    """An ingress, and the requests that it sends to its replicas."""
    asked: list[Any] = []

    def remote(one: Any) -> Any:
        asked.append(one)
        return answer

    handle = SimpleNamespace(answer=SimpleNamespace(remote=remote))
    handle.options = lambda stream: handle
    ingress = object.__new__(Ingress)
    Ingress.__mro__[1].__init__(ingress, handle, coordinator, ["base", "other"])
    return ingress, asked


def ask(answer: Answer, content: bytes = b"{}") -> tuple[Response, Any]:
    """The response to a request with this body, and the request that the replica gets."""
    ingress, asked = make(answer)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/app/v1/x", "query_string": b"a=1", "headers": [(b"x", b"y")]}
    response = asyncio.run(ingress.forward("v1/x", Request(scope, receive)))
    return response, asked[0]


def read(response: Any) -> bytes:
    async def parts() -> bytes:
        return b"".join([part async for part in response.body_iterator])

    return asyncio.run(parts())


def test_an_answer_is_given_back_as_it_came() -> None:
    headers = [*JSON, (b"set-cookie", b"a"), (b"set-cookie", b"b")]
    answer = Answer([start(headers, 418)], [body(b"one"), body(b"two")], [body(b"three")])
    response, asked = ask(answer, b'{"model": "sst2"}')
    assert (response.status_code, response.raw_headers) == (418, headers)
    assert read(response) == b"onetwothree"
    assert (asked.method, asked.path, asked.query, asked.headers) == ("POST", "/v1/x", b"a=1", [(b"x", b"y")])
    assert (asked.body, asked.adapter) == (b'{"model": "sst2"}', "sst2")


@pytest.mark.parametrize("lost", [ActorDiedError(), DeploymentUnavailableError("Replica")])
@pytest.mark.parametrize("steps", [[], [[start(SSE)]]], ids=["nothing", "a status"])
def test_before_the_first_word_a_failure_is_a_status(lost: Exception, steps: list[Any]) -> None:
    response, _ = ask(Answer(*steps, lost))
    assert response.status_code == 503
    assert (b"retry-after", b"1") in response.raw_headers
    assert json.loads(read(response))["error"]["message"] == LOST


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    answer = Answer([start(SSE), body(b"data: {}\n\n")], ActorDiedError())
    response, _ = ask(answer)
    first, event, rest = read(response).split(b"\n\n")
    assert (response.status_code, first, rest) == (200, b"data: {}", b"")
    error = json.loads(event.removeprefix(b"data: "))["error"]
    assert error == {"message": LOST, "type": "ServiceUnavailableError", "param": None, "code": 503}
    assert answer.cancelled


def test_half_a_document_is_no_whole_one() -> None:
    response, _ = ask(Answer([start(JSON), body(b'{"text": "ha')], ActorDiedError()))
    with pytest.raises(ActorDiedError):
        read(response)


def test_a_client_that_goes_before_the_first_word_ends_its_request() -> None:
    answer = Answer([start()], asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        ask(answer)
    assert answer.cancelled


def test_health_tells_that_there_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(Answer):
        async def __anext__(self) -> Any:
            await asyncio.Event().wait()

    # Serve pickled the class when it was decorated, so its methods have their own copy of the module's globals.
    health = Ingress.__mro__[1].health
    monkeypatch.setitem(health.__globals__, "HEALTH_S", 0.05)
    answer = Never()
    ingress, _ = make(answer)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/health", "query_string": b"", "headers": []}
    response = asyncio.run(health(ingress, Request(scope, receive)))
    assert response.status_code == 503
    assert b"no replica has answered" in response.body
    assert answer.cancelled


@pytest.mark.parametrize(
    ("content", "adapter"),
    [
        (b'{"model": "sst2"}', "sst2"),
        (b'{"model": "base"}', None),
        (b'{"model": "other"}', None),
        (b'{"model": 3}', None),
        (b"[1]", None),
        (b'"text"', None),
        (b"", None),
        (b"\xff\xfe{", None),
        (b"[" * 100_000, None),
    ],
)
def test_the_adapter_in_a_request(content: bytes, adapter: str | None) -> None:
    assert make()[0].adapter(fields(content)) == adapter


SYSTEM, FIRST = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
TURNS = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]


def key(*messages: Any, **others: Any) -> bytes | None:
    """The conversation's key that the router gets."""
    content = {"model": "sst2", "messages": messages, **others}
    return ask(Answer([start(), body(b"")]), json.dumps(content).encode())[1].conversation


def test_all_turns_of_a_conversation_have_one_key() -> None:
    first = key(SYSTEM, FIRST)
    assert isinstance(first, bytes)
    assert len(first) == 16
    assert key(SYSTEM, FIRST, *TURNS) == key(SYSTEM, FIRST, *TURNS, *TURNS, temperature=0.5) == first
    # The order of an object's keys does not matter.
    assert key(SYSTEM, dict(reversed(FIRST.items()))) == first
    assert key(FIRST, model=None) == key(FIRST, *TURNS, model=None)
    parts = {"role": "user", "content": [{"type": "text", "text": "\ud800"}]}
    assert key(parts) == key(parts, *TURNS)


def test_other_conversations_have_other_keys() -> None:
    other = {**FIRST, "content": "Hello!"}
    keys = [key(SYSTEM, FIRST), key(FIRST), key(SYSTEM, other), key(SYSTEM, FIRST, model="base")]
    assert None not in keys
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "content",
    [
        {"model": "sst2", "prompt": "Hello"},
        {"model": "sst2", "messages": []},
        {"model": "sst2", "messages": [SYSTEM]},
        {"model": "sst2", "messages": "Hello"},
        {"model": "sst2", "messages": {"role": "user"}},
        {"model": "sst2", "messages": ["Hello", FIRST]},
        {"model": "sst2", "messages": [{"content": "Hello"}]},
        {"model": 3, "messages": [FIRST]},
        [FIRST],
    ],
)
def test_what_is_no_chat_has_no_key(content: Any) -> None:
    assert conversation(fields(json.dumps(content).encode())) is None


@pytest.mark.parametrize(
    ("failed", "status"),
    [
        (AdapterRefused("why"), 400),
        (UnknownAdapter("why"), 404),
        (NotConfirmed("why"), 503),
        (DeploymentUnavailableError("Coordinator"), 503),
    ],
)
def test_what_changes_of_adapters_answer(failed: Exception, status: int) -> None:
    async def change() -> None:
        raise failed

    response = asyncio.run(make()[0]._change(change(), "done"))
    assert response.status_code == status
    if "why" in str(failed):
        assert json.loads(response.body)["error"]["message"] == "why"


def test_paths_must_be_absolute() -> None:
    with pytest.raises(AdapterRefused, match=r"path is 'x/y'; give an absolute one"):
        asyncio.run(make()[0].load("a", "x/y"))


def test_the_requests_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request has an existing route, a method and a body that it accepts, and the administrator's key."""
    monkeypatch.setenv("PARADE_ADMIN_KEY", "secret")
    bodies = {"/v1/load_parade_adapter": LoadBody, "/v1/unload_parade_adapter": UnloadBody, "/v1/parade_adapters": None}
    (text,) = texts("docs/ray.md", "tests/cluster/test_ingress.py::test_the_requests_of_the_page", "bash")
    asked = {}
    for curl, url, *words in commands(text):
        flags = list(zip(words[::2], words[1::2], strict=True))
        headers = [tuple(part.strip().lower() for part in value.split(":")) for flag, value in flags if flag == "-H"]
        raw = [(name.encode(), value.replace("bearer", "Bearer").encode()) for name, value in headers]
        administrator(Request({"type": "http", "headers": raw}))
        with pytest.raises(HTTPException):
            administrator(Request({"type": "http", "headers": []}))
        content = dict(flags).get("-d")
        path = url.removeprefix("http://localhost:8000")
        (methods,) = (route.methods for route in routes.routes if getattr(route, "path", None) == path)
        assert curl == "curl"
        assert ("POST" if content else "GET") in methods
        asked[path] = content and bodies[path].model_validate_json(content)
    assert asked.keys() == bodies.keys()
    assert asked["/v1/load_parade_adapter"].parade_name == asked["/v1/unload_parade_adapter"].parade_name
