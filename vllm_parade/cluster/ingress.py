# SPDX-License-Identifier: Apache-2.0
"""The application's front door: finds the adapter in a request, sends it to a replica, and gives back what comes."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterable
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

# What a replica's death looks like from here.
LOST = (RayError, RayServeException)
LOST_MESSAGE = "the replica that answered this request has failed; ask again"
# How long /health waits for a replica.
HEALTH_S = 5.0
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]
# Environment variable with the key that routes for administrators ask for, as VLLM_API_KEY is for the others.
ADMIN_KEY = "PARADE_ADMIN_KEY"

# Replicas have vLLM's documentation pages.
routes = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class LoadBody(BaseModel, extra="forbid"):
    """What an administrator sends to have an adapter served, as vLLM's route for LoRA takes it."""

    parade_name: str
    parade_path: str
    base_model_name: str | None = None


class UnloadBody(BaseModel, extra="forbid"):
    """What an administrator sends to have an adapter served no longer."""

    parade_name: str


def administrator(request: Request) -> None:
    """Let only those in who know the key; without a key in the environment nobody."""
    key = os.environ.get(ADMIN_KEY)
    if not key:
        raise HTTPException(HTTPStatus.FORBIDDEN, f"set {ADMIN_KEY} in the ingress' environment to use this route")
    if not secrets.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        raise HTTPException(HTTPStatus.UNAUTHORIZED, f"give the value of {ADMIN_KEY} as bearer token")


@routes.exception_handler(HTTPException)
async def refuse(_: Request, exception: HTTPException) -> Response:
    return JSONResponse(error(HTTPStatus(exception.status_code), exception.detail), exception.status_code)


def reason(failed: BaseException) -> str:
    """What another process raised, without Ray's account of where."""
    return str(getattr(failed, "cause", None) or failed)


# Serve pickles the routes here and now: what they call must stand above.
@serve.ingress(routes)
class Ingress:
    """Routes of administrators are answered here, all others by a replica's vLLM.

    `load`, `unload` and `adapters` are also methods of the application's handle.
    """

    def __init__(self, replicas: DeploymentHandle, coordinator: DeploymentHandle, base_names: Iterable[str]) -> None:
        self.replicas, self.coordinator = replicas.options(stream=True), coordinator
        self.base_names = frozenset(base_names)

    async def load(self, name: str, path: str, base_model_name: str | None = None) -> None:
        """Serve an adapter; when this returns, all replicas do.

        Raises:
            AdapterRefused: nothing has changed; the message says why.
            NotConfirmed: a replica does not answer; the adapter is not served.
        """
        if not os.path.isabs(path):
            raise AdapterRefused(f"path is {path!r}; give an absolute one, which all machines have")
        await self.coordinator.load.remote(ParadeModule(name, path, base_model_name))

    async def unload(self, name: str) -> None:
        """Serve an adapter no longer; when this returns, all replicas answer 404 to its name.

        Raises:
            AdapterRefused: there is no such adapter.
            NotConfirmed: a replica does not answer.
        """
        await self.coordinator.unload.remote(name)

    async def adapters(self) -> dict[str, Any]:
        """The adapters, and which replicas have them."""
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
        """What a replica's engine says. Other requests wait for a replica, this one tells that there is none."""
        try:
            async with asyncio.timeout(HEALTH_S):
                return await self.forward("health", request)
        except TimeoutError:
            message = f"no replica has answered within {HEALTH_S:g} s"
            return JSONResponse(error(HTTPStatus.SERVICE_UNAVAILABLE, message), HTTPStatus.SERVICE_UNAVAILABLE)

    @routes.api_route("/{path:path}", methods=METHODS)
    async def forward(self, path: str, request: Request) -> Response:
        # Without the application's own prefix, which replicas do not know.
        body, query = await request.body(), request.url.query.encode()
        asked = ClientRequest(request.method, f"/{path}", query, list(request.headers.raw), body, self.adapter(body))
        messages: list[Message] = []
        stream = self.replicas.answer.remote(asked)
        try:
            # The status waits for the answer's first part: until then a failure can still be told by a status.
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
                # Half a document: the connection breaks, so that nobody takes it for a whole one.
                raise
            event = error(HTTPStatus.SERVICE_UNAVAILABLE, LOST_MESSAGE)
            yield f"data: {json.dumps(event)}\n\n".encode()
        finally:
            stream.cancel()

    def adapter(self, body: bytes) -> str | None:
        """Name of the adapter in a request's body; None for the base model and for what names no model."""
        try:
            model = json.loads(body)["model"]
        except (ValueError, KeyError, TypeError):
            return None
        return model if isinstance(model, str) and model not in self.base_names else None
