# SPDX-License-Identifier: Apache-2.0
"""Applies the application's list of adapters to one replica's engine, and reports the result."""

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_parade.cluster.entries import Entry, Report, Snapshot
from vllm_parade.frontend.adapters import AdapterRegistry, ensure_loaded
from vllm_parade.request import ParadeRequest

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

logger = init_logger("vllm.parade.follower")


class Follower:
    """The adapters of one engine, and their names in its OpenAI-compatible app."""

    def __init__(self, models: "OpenAIServingModels") -> None:
        self.models, self.engine = models, models.engine_client
        self.registry = AdapterRegistry.of(self.engine.input_processor)
        # Adapters of --parade-modules are not served until all replicas have read them.
        self._held: dict[str, ParadeRequest] = dict(models.lora_requests)
        models.lora_requests.clear()
        self._entries: Mapping[str, Entry] = {}
        self.report = Report(host=socket.gethostname(), pid=os.getpid())

    @property
    def num_served(self) -> int:
        """Number of adapters that requests can name."""
        return len(self.models.lora_requests)

    async def apply(self, snapshot: Snapshot) -> int:
        """Load the adapters of the list, serve those that all replicas have read, and withdraw all others.

        An adapter that cannot be loaded is reported as a problem and tried again at the next call. It does not block
        the other adapters.

        Returns:
            number of adapters that were loaded by this call
        """
        if snapshot.entries is not None:
            self._entries = snapshot.entries
        contents: dict[str, str] = {}
        problems: dict[str, str] = {}
        self._withdraw()
        before = set(self._held)
        for name, entry in self._entries.items():
            try:
                content = await self._hold(entry)
            except VLLMValidationError as error:
                problems[name] = str(error)
                logger.error("Adapter %r is not served by this replica: %s", name, error)
                continue
            if entry.content is None:
                contents[name] = content
            else:
                self.models.lora_requests[name] = self._held[name]
        self.report = replace(self.report, version=snapshot.version, contents=contents, problems=problems)
        return len(self._held.keys() - before)

    def _withdraw(self) -> None:
        for name, request in list(self._held.items()):
            entry = self._entries.get(name)
            if entry is None or entry.module.path != request.path:
                self.models.lora_requests.pop(name, None)
                self.registry.unpin(self._held.pop(name))

    async def _hold(self, entry: Entry) -> str:
        """Load an adapter into the workers' host memory and pin it; returns its content hash."""
        module = entry.module
        request = self._held.get(module.name)
        if request is None:
            request = ParadeRequest(module.name, module.path, base_model_name=module.base_model_name)
            await ensure_loaded(self.engine, request)
        content = self.registry.content_hash(request)
        if entry.content not in (None, content):
            raise VLLMValidationError(
                f"adapter {module.name!r}: the files in {module.path} differ from those that the other replicas read; "
                "unload it, and load it from a path that has not been used before"
            )
        self.registry.pin(request)
        self._held[module.name] = request
        return content
