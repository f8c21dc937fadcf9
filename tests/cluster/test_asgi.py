# SPDX-License-Identifier: Apache-2.0
"""An ASGI app called without a server: the messages that it gets and returns."""

import asyncio
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from vllm_parade.cluster.asgi import ClientRequest, call, error, refusal

app = FastAPI()
seen: list[str] = []


@app.post("/echo")
async def echo(request: Request) -> dict[str, Any]:
    return {"query": dict(request.query_params), "body": (await request.body()).decode(), "x": request.headers["x"]}


@app.get("/endless")
async def endless() -> StreamingResponse:
    async def parts():
        try:
            while True:
                yield b"part"
                await asyncio.sleep(0.001)
        finally:
            seen.append("ended")

    return StreamingResponse(parts())


@app.get("/broken")
async def broken() -> None:
    raise RuntimeError("broken")


def asked(path: str, method: str = "GET", body: bytes = b"") -> ClientRequest:
    return ClientRequest(method, path, b"a=1", [(b"x", b"y")], body, None)


def test_an_answer_is_the_apps() -> None:
    async def run() -> list[Any]:
        return [message async for messages in call(app, asked("/echo", "POST", b"hello")) for message in messages]

    start, *parts = asyncio.run(run())
    assert start["type"] == "http.response.start"
    assert start["status"] == 200
    assert (b"content-type", b"application/json") in start["headers"]
    assert b"".join(part["body"] for part in parts) == b'{"query":{"a":"1"},"body":"hello","x":"y"}'


def test_an_app_whose_caller_stops_is_told_that_the_client_has_gone() -> None:
    async def run() -> None:
        async with aclosing(call(app, asked("/endless"))) as answer:
            async for messages in answer:
                if any(message.get("body") for message in messages):
                    break
        for _ in range(200):
            if seen:
                break
            await asyncio.sleep(0.01)

    seen.clear()
    asyncio.run(run())
    assert seen == ["ended"]


def test_what_an_app_raises_comes_out() -> None:
    async def run() -> None:
        async for _ in call(app, asked("/broken")):
            pass

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(run())


def test_errors_look_like_vllms() -> None:
    assert error(HTTPStatus.NOT_FOUND, "gone") == {
        "error": {"message": "gone", "type": "NotFoundError", "param": None, "code": 404}
    }
    assert error(HTTPStatus.INTERNAL_SERVER_ERROR, "")["error"]["type"] == "InternalServerError"
    start, body = refusal(HTTPStatus.SERVICE_UNAVAILABLE, "later")
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert b'"type": "ServiceUnavailableError"' in body["body"]
    assert len(refusal(HTTPStatus.BAD_REQUEST, "no")[0]["headers"]) == 1
