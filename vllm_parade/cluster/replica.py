# SPDX-License-Identifier: Apache-2.0
"""A replica of the Ray Serve deployment: an engine with PARADE behind vLLM's own app."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from http import HTTPStatus
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge

from vllm_parade.cluster import lifeline, logs
from vllm_parade.cluster.asgi import ClientRequest, Message, call, refusal

logger = logging.getLogger("ray.serve")

# Seconds between attempts to reach the coordinator.
RETRY_S = 0.5
# Timeout for telling the coordinator that this replica stops.
LEAVE_S = 5.0
# Names the replica that answered, for clients and tests.
REPLICA_HEADER = b"x-parade-replica"


class Replica:
    """Answers requests, and keeps its engine's adapters equal to the application's list.

    It takes no request before it serves all adapters of the list. If it cannot reach the coordinator, it keeps serving
    the adapters that it has.
    """

    # Serve awaits async constructors.
    async def __init__(self, options: Mapping[str, Any], coordinator: DeploymentHandle) -> None:  # type: ignore[misc]
        lifeline.hold()
        self.name = ray.get_runtime_context().get_actor_name()
        self.coordinator, self.running = coordinator, AsyncExitStack()
        modules = await coordinator.modules.remote()
        with logs.kept():
            # Imported here, so that building the application does not import vLLM.
            from vllm_parade.cluster import engine
            from vllm_parade.cluster.follower import Follower

            args = engine.parse({**options, "parade_modules": [vars(module) for module in modules] or None})
            self.app = await self.running.enter_async_context(engine.serving(args))
        self.engine = self.app.state.engine_client
        self.follower = Follower(self.app.state.openai_serving_models)
        self.loads = Counter("vllm_parade_adapter_loads", "Adapters that the replica has read from disk.")
        self.served = Gauge("vllm_parade_adapters_served", "Adapters that the replica serves.")
        while not await self._step():
            pass
        self.following = asyncio.ensure_future(self._follow())

    async def _step(self) -> bool:
        """Wait for the list's next version and apply it; returns whether no adapter still waits for confirmation."""
        snapshot = await self.coordinator.poll.remote(self.name, self.follower.report)
        read = await self.follower.apply(snapshot)
        if read:
            self.loads.inc(read)
        self.served.set(self.follower.num_served)
        return not self.follower.report.contents

    async def _follow(self) -> None:
        while True:
            try:
                await self._step()
            except (RayError, RayServeException) as error:
                logger.warning("Cannot reach the coordinator for the list of adapters; trying again: %s", error)
                await asyncio.sleep(RETRY_S)

    async def answer(self, asked: ClientRequest) -> AsyncIterator[list[Message]]:
        """Yield the messages that vLLM's app sends for a request.

        Raises:
            RuntimeError: the engine has died.
        """
        problem = self.follower.report.problems.get(asked.adapter or "")
        if problem is not None:
            yield refusal(HTTPStatus.SERVICE_UNAVAILABLE, problem)
            return
        async for messages in call(self.app, asked):
            if self.engine.errored:
                raise RuntimeError("the engine has died")
            for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA_HEADER, self.name.encode())]
            yield messages

    async def check_health(self) -> None:
        """Called by Serve. Raises if the engine has died or the task that follows the list has failed."""
        await self.engine.check_health()
        if self.following.done():
            self.following.result()

    async def __del__(self) -> None:
        """Called by Serve when it stops a replica gracefully."""
        if hasattr(self, "following"):
            self.following.cancel()
            # If this fails, the coordinator detects the dead replica by itself.
            with suppress(RayError, RayServeException, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self.coordinator.leave.remote(self.name)
        await self.running.aclose()
