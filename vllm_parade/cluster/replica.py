# SPDX-License-Identifier: Apache-2.0
"""One replica: an engine with PARADE behind vLLM's own app, as a Ray Serve deployment."""

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

# Between attempts to reach the coordinator.
RETRY_S = 0.5
# How long a replica that stops in good order waits for the coordinator.
LEAVE_S = 5.0
# Tells clients and tests which replica has answered.
REPLICA_HEADER = b"x-parade-replica"


class Replica:
    """Answers requests, and keeps its engine's adapters as the application's list says.

    It takes no request before its adapters are those of the list. While the coordinator cannot be reached it goes on
    with those it has.
    """

    # Serve awaits a constructor.
    async def __init__(self, options: Mapping[str, Any], coordinator: DeploymentHandle) -> None:  # type: ignore[misc]
        lifeline.hold()
        self.name = ray.get_runtime_context().get_actor_name()
        self.coordinator, self.running = coordinator, AsyncExitStack()
        modules = await coordinator.modules.remote()
        with logs.kept():
            # vLLM is loaded here and not where the application is built.
            from vllm_parade.cluster import engine
            from vllm_parade.cluster.follower import Follower

            args = engine.parse({**options, "parade_modules": [vars(module) for module in modules] or None})
            self.app = await self.running.enter_async_context(engine.serving(args))
        self.engine = self.app.state.engine_client
        self.follower = Follower(self.app.state.openai_serving_models)
        self.loads = Counter("vllm_parade_adapter_loads", "Adapters that a replica read from their folders.")
        self.served = Gauge("vllm_parade_adapters_served", "Adapters that a replica serves.")
        while not await self._step():
            pass
        self.following = asyncio.ensure_future(self._follow())

    async def _step(self) -> bool:
        """Wait for the list's next version and apply it; returns whether all that is on it is served."""
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
                logger.warning("The list of adapters cannot be reached, trying again: %s", error)
                await asyncio.sleep(RETRY_S)

    async def answer(self, asked: ClientRequest) -> AsyncIterator[list[Message]]:
        """What vLLM's app sends for a request.

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
        """Called by Serve, which replaces a replica whose engine has died, or that follows the list no more."""
        await self.engine.check_health()
        if self.following.done():
            self.following.result()

    async def __del__(self) -> None:
        """Called by Serve when it stops a replica in good order."""
        if hasattr(self, "following"):
            self.following.cancel()
            # Where nobody listens, the coordinator finds out by itself.
            with suppress(RayError, RayServeException, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self.coordinator.leave.remote(self.name)
        await self.running.aclose()
