# SPDX-License-Identifier: Apache-2.0
"""An HTTP request that travels to a replica, and an ASGI app that answers it there, message by message."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]
Headers = list[tuple[bytes, bytes]]
App = Callable[..., Awaitable[None]]
# When a client may try again what has failed for a reason that passes.
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class ClientRequest:
    """A client's request, as it came."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    adapter: str | None
    """Adapter that it names as its model; None for one that goes to any replica."""

    def scope(self) -> dict[str, Any]:
        """The request in ASGI's form."""
        return {
            "type": "http",
            # From 2.4 on, apps learn that a client has gone from an error when they send; here they are told.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": None,
            "server": None,
        }


async def call(app: App, asked: ClientRequest) -> AsyncIterator[list[Message]]:
    """What the app sends, as it comes; several messages together where they came faster than they were taken.

    A caller that stops early is a client that has gone: the app is told, and ends what it does for it.

    Raises:
        Exception: what the app raised.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    parts = iter([{"type": "http.request", "body": asked.body, "more_body": False}])

    async def receive() -> Message:
        for part in parts:
            return part
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(asked.scope(), receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        ended = False
        while not ended:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            ended = messages[-1] is None
            if given := [message for message in messages if message is not None]:
                yield given
        await task
    finally:
        gone.set()


def error(status: HTTPStatus, message: str) -> dict[str, Any]:
    """The body of an error, in the form that vLLM and OpenAI's clients know."""
    kind = status.phrase.title().replace(" ", "")
    details = {"message": message, "type": kind.removesuffix("Error") + "Error", "param": None, "code": status.value}
    return {"error": details}


def refusal(status: HTTPStatus, message: str) -> list[Message]:
    """An error as an app's messages; one that a client may try again says when."""
    headers = [(b"content-type", b"application/json")]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    return [
        {"type": "http.response.start", "status": status.value, "headers": headers},
        {"type": "http.response.body", "body": json.dumps(error(status, message)).encode()},
    ]


# asyncio itself keeps no task alive.
_running: set[asyncio.Future[None]] = set()
