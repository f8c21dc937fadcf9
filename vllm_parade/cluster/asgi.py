# SPDX-License-Identifier: Apache-2.0
"""HTTP requests in a form that can be sent to a replica, and a streaming call of the replica's ASGI app."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]
Headers = list[tuple[bytes, bytes]]
App = Callable[..., Awaitable[None]]
# Retry-After of temporary failures.
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class ClientRequest:
    """A client's request, unchanged."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    adapter: str | None
    """Name of the requested adapter; None if any replica can answer."""
    conversation: bytes | None = None
    """Key of the chat that the request continues, the same in all its turns; None if the request is not a chat."""

    def scope(self) -> dict[str, Any]:
        """The request as an ASGI scope."""
        return {
            "type": "http",
            # From 2.4 on, send() raises when the client has disconnected; here the app gets http.disconnect instead.
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
    """Yield the app's messages as it sends them. Messages that queue up are yielded together.

    If the caller stops early, the client has disconnected: the app gets http.disconnect and stops its work.

    Raises:
        Exception: any exception of the app.
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
    """The body of an error, in the format of vLLM and OpenAI's clients."""
    kind = status.phrase.title().replace(" ", "")
    details = {"message": message, "type": kind.removesuffix("Error") + "Error", "param": None, "code": status.value}
    return {"error": details}


def refusal(status: HTTPStatus, message: str) -> list[Message]:
    """An error as ASGI messages; 503 has a Retry-After header."""
    headers = [(b"content-type", b"application/json")]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    return [
        {"type": "http.response.start", "status": status.value, "headers": headers},
        {"type": "http.response.body", "body": json.dumps(error(status, message)).encode()},
    ]


# asyncio keeps only weak references to tasks.
_running: set[asyncio.Future[None]] = set()
