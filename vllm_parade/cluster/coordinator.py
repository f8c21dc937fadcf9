# SPDX-License-Identifier: Apache-2.0
"""The list of adapters as a Ray Serve deployment with one replica. It restores its state from Ray's store."""

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Iterable
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_NAMESPACE

from vllm_parade.cluster.adapters import AdapterList, AdapterRefused
from vllm_parade.cluster.entries import Entry, Report, Snapshot
from vllm_parade.config import ParadeModule

logger = logging.getLogger("ray.serve")

KV_NAMESPACE = b"vllm_parade"
PING_S = 2.0


class Coordinator:
    """Holds the application's `AdapterList` and saves it in Ray's store.

    The saved state survives this process and Serve's controller, and is lost with the cluster, like Serve's own state.
    A new deployment of the application restores it.
    """

    # Serve awaits async constructors.
    async def __init__(self, modules: Iterable[ParadeModule], base_names: Iterable[str]) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        self.key = f"adapters-{context.app_name}".encode()
        self.given = {module.name: module for module in modules}
        self.adapters = AdapterList(base_names, self._save, self._is_alive)
        self._restore()
        self.settling = [
            asyncio.ensure_future(self._settle(name))
            for name, entry in self.adapters.entries.items()
            if entry.content is None
        ]

    def _restore(self) -> None:
        """Restore the saved list, and apply changes of the application's `adapters` argument since it was saved."""
        stored = internal_kv._internal_kv_get(self.key, namespace=KV_NAMESPACE)
        version, given, entries, replicas = pickle.loads(stored) if stored else (0, {}, {}, [])
        kept = {
            name: entry
            for name, entry in entries.items()
            if entry.content is not None and (name not in given or given[name] == self.given.get(name))
        }
        fresh = {
            name: Entry(module)
            for name, module in self.given.items()
            if name not in kept and (given.get(name) != module or (name in entries and entries[name].content is None))
        }
        self.adapters.entries = {**fresh, **kept}
        self.adapters.replicas = dict.fromkeys(replicas, Report())
        self.adapters.version = version + 1
        self._save(self.adapters)

    def _save(self, adapters: AdapterList) -> None:
        state = (adapters.version, self.given, adapters.entries, list(adapters.replicas))
        internal_kv._internal_kv_put(self.key, pickle.dumps(state), overwrite=True, namespace=KV_NAMESPACE)

    async def _settle(self, name: str) -> None:
        try:
            await self.adapters.settle_when_read(name)
        except AdapterRefused as error:
            logger.error("%s", error)

    async def _is_alive(self, replica: str) -> bool:
        """Whether a replica's process may still answer; False only if Ray reports that it is dead."""
        try:
            actor = ray.get_actor(replica, namespace=SERVE_NAMESPACE)
            with contextlib.suppress(ActorUnavailableError, TimeoutError):
                await asyncio.wait_for(actor.__ray_ready__.remote(), PING_S)
        except (ValueError, ActorDiedError):
            return False
        return True

    async def modules(self) -> list[ParadeModule]:
        """Adapters that are not confirmed yet, so that an engine can refuse them before it loads its model."""
        return [entry.module for entry in self.adapters.entries.values() if entry.content is None]

    async def poll(self, replica: str, report: Report) -> Snapshot:
        """See AdapterList.poll."""
        return await self.adapters.poll(replica, report)

    async def leave(self, replica: str) -> None:
        """See AdapterList.leave."""
        self.adapters.leave(replica)

    async def load(self, module: ParadeModule) -> None:
        """See AdapterList.load."""
        await self.adapters.load(module)

    async def unload(self, name: str) -> None:
        """See AdapterList.unload."""
        await self.adapters.unload(name)

    async def describe(self) -> dict[str, Any]:
        """See AdapterList.describe; dead replicas are removed first."""
        await self.adapters.forget_dead(self.adapters.replicas)
        return self.adapters.describe()
