# SPDX-License-Identifier: Apache-2.0
"""The application's ingress: reads adapter and conversation from a request, and forwards the request to a replica."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterable
from hashlib import blake2b
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from vllm_parade.cluster.adapters import AdapterRefused, NotConfirmed, UnknownAdapter
from vllm_parade.cluster.asgi import ClientRequest, Headers, Message, error, refusal
from vllm_parade.config import ParadeModule

# Exceptions that a dead replica causes here.
LOST = (RayError, RayServeException)
LOST_MESSAGE = "the replica that answered this request has failed; ask again"
# Timeout of /health.
HEALTH_S = 5.0
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]
# Environment variable with the key for the administrator routes; VLLM_API_KEY is the key for the others.
ADMIN_KEY = "PARADE_ADMIN_KEY"

# Disabled: requests for vLLM's documentation pages are forwarded to a replica.
routes = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class LoadBody(BaseModel, extra="forbid"):
    """Body of a load request, analogous to that of vLLM's LoRA route."""

    parade_name: str
    parade_path: str
    base_model_name: str | None = None


class UnloadBody(BaseModel, extra="forbid"):
    """Body of an unload request."""

    parade_name: str


def administrator(request: Request) -> None:
    """Require the administrator key; refuses all requests if the environment has no key."""
    key = os.environ.get(ADMIN_KEY)
    if not key:
        raise HTTPException(HTTPStatus.FORBIDDEN, f"set {ADMIN_KEY} in the ingress' environment to use this route")
    if not secrets.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        raise HTTPException(HTTPStatus.UNAUTHORIZED, f"give the value of {ADMIN_KEY} as bearer token")


@routes.exception_handler(HTTPException)
async def refuse(_: Request, exception: HTTPException) -> Response:
    return JSONResponse(error(HTTPStatus(exception.status_code), exception.detail), exception.status_code)


def reason(failed: BaseException) -> str:
    """Message of an exception of another process, without Ray's traceback."""
    return str(getattr(failed, "cause", None) or failed)


def fields(body: bytes) -> dict[str, Any]:
    """Fields of a request's body; none if the body is not a JSON object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def conversation(content: dict[str, Any]) -> bytes | None:
    """Key of the chat that a request continues; None if the request is not a chat.

    The key is a digest of the model's name and the messages up to the first one of the user. So all turns of a chat
    have the same key, and chats that begin alike share one.
    """
    model, messages = content.get("model"), content.get("messages")
    if not isinstance(model, str | None) or not isinstance(messages, list):
        return None
    if not all(isinstance(message, dict) for message in messages):
        return None
    for count, message in enumerate(messages, 1):
        if message.get("role") == "user":
            text = json.dumps([model, messages[:count]], sort_keys=True)
            return blake2b(text.encode(), digest_size=16).digest()
    return None


# Serve pickles the routes when this decorator runs, so all functions that they call must be defined above.
@serve.ingress(routes)
class Ingress:
    """Answers the administrator routes and forwards all others to a replica.

    `load`, `unload` and `adapters` are also methods of the application's handle.
    """

    def __init__(self, replicas: DeploymentHandle, coordinator: DeploymentHandle, base_names: Iterable[str]) -> None:
        self.replicas, self.coordinator = replicas.options(stream=True), coordinator
        self.base_names = frozenset(base_names)

    async def load(self, name: str, path: str, base_model_name: str | None = None) -> None:
        """Serve an adapter. Returns when all replicas serve it.

        Raises:
            AdapterRefused: nothing has changed; the message names the reason.
            NotConfirmed: a replica does not answer; the adapter is not served.
        """
        if not os.path.isabs(path):
            raise AdapterRefused(f"path is {path!r}; give an absolute one, which all machines have")
        await self.coordinator.load.remote(ParadeModule(name, path, base_model_name))

    async def unload(self, name: str) -> None:
        """Stop serving an adapter. Returns when all replicas answer 404 to its name.

        Raises:
            AdapterRefused: no adapter has that name, or it is still being loaded.
            NotConfirmed: a replica does not answer.
        """
        await self.coordinator.unload.remote(name)

    async def adapters(self) -> dict[str, Any]:
        """The adapters and replicas; see AdapterList.describe."""
        return await self.coordinator.describe.remote()

    @routes.post("/v1/load_parade_adapter", dependencies=[Depends(administrator)])
    async def load_route(self, body: LoadBody) -> Response:
        change = self.load(body.parade_name, body.parade_path, body.base_model_name)
        return await self._change(change, f"loaded {body.parade_name!r}")

    @routes.post("/v1/unload_parade_adapter", dependencies=[Depends(administrator)])
    async def unload_route(self, body: UnloadBody) -> Response:
        return await self._change(self.unload(body.parade_name), f"unloaded {body.parade_name!r}")

    @routes.get("/v1/parade_adapters", dependencies=[Depends(administrator)])
    async def adapters_route(self) -> Response:
        return JSONResponse(await self.adapters())

    async def _change(self, change: Any, done: str) -> Response:
        try:
            await change
        except UnknownAdapter as refused:
            status, message = HTTPStatus.NOT_FOUND, reason(refused)
        except AdapterRefused as refused:
            status, message = HTTPStatus.BAD_REQUEST, reason(refused)
        except (NotConfirmed, *LOST) as failed:
            status, message = HTTPStatus.SERVICE_UNAVAILABLE, reason(failed)
        else:
            return JSONResponse({"message": done})
        return JSONResponse(error(status, message), status)

    @routes.get("/health")
    async def health(self, request: Request) -> Response:
        """Health of one replica's engine. Other requests wait for a replica; this one fails if there is none."""
        try:
            async with asyncio.timeout(HEALTH_S):
                return await self.forward("health", request)
        except TimeoutError:
            message = f"no replica has answered within {HEALTH_S:g} s"
            return JSONResponse(error(HTTPStatus.SERVICE_UNAVAILABLE, message), HTTPStatus.SERVICE_UNAVAILABLE)

    @routes.api_route("/{path:path}", methods=METHODS)
    async def forward(self, path: str, request: Request) -> Response:
        # Replicas do not know the application's route prefix, so the forwarded path has none.
        body, query = await request.body(), request.url.query.encode()
        content = fields(body)
        names = (self.adapter(content), conversation(content))
        asked = ClientRequest(request.method, f"/{path}", query, list(request.headers.raw), body, *names)
        messages: list[Message] = []
        stream = self.replicas.answer.remote(asked)
        try:
            # The status is sent with the first part of the body. A failure before that still gets an error status.
            while not any(message["type"] == "http.response.body" for message in messages):
                messages += await anext(stream)
        except LOST:
            messages = refusal(HTTPStatus.SERVICE_UNAVAILABLE, LOST_MESSAGE)
        except BaseException:
            stream.cancel()
            raise
        start, *parts = messages
        response = StreamingResponse(self._parts(parts, stream, start["headers"]), start["status"])
        response.raw_headers = list(start["headers"])
        return response

    async def _parts(self, first: list[Message], stream: Any, headers: Headers) -> AsyncIterator[bytes]:
        try:
            for message in first:
                yield message.get("body", b"")
            async for messages in stream:
                for message in messages:
                    yield message.get("body", b"")
        except LOST:
            if not dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                # The document is incomplete. Break the connection, so that the client does not take it for complete.
                raise
            event = error(HTTPStatus.SERVICE_UNAVAILABLE, LOST_MESSAGE)
            yield f"data: {json.dumps(event)}\n\n".encode()
        finally:
            stream.cancel()

    def adapter(self, content: dict[str, Any]) -> str | None:
        """Name of the adapter in a request's body; None for the base model or if the body names no model."""
        model = content.get("model")
        return model if isinstance(model, str) and model not in self.base_names else None
