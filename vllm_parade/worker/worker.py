# SPDX-License-Identifier: Apache-2.0
"""PARADE's extension of vLLM's workers: the model runner, and remote calls to load and free adapters."""

from typing import TYPE_CHECKING, Any

from vllm_parade.worker.manager import ParadeManager
from vllm_parade.worker.runner_v1 import ParadeModelRunnerMixin
from vllm_parade.worker.runner_v2 import ParadeModelRunnerV2Mixin

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as Base
else:
    Base = object


class ParadeWorkerMixin(Base):
    """Mixin for vLLM's workers."""

    def init_device(self) -> None:
        """Initialize the device, and mix PARADE into the model runner that vLLM chose."""
        super().init_device()
        mixin = ParadeModelRunnerV2Mixin if self.use_v2_model_runner else ParadeModelRunnerMixin
        runner_class = type(self.model_runner)
        self.model_runner.__class__ = type(f"Parade{runner_class.__name__}", (mixin, runner_class), {})

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and add the vector tables to its layers, before profiling measures memory."""
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        runner.parade = ParadeManager(self.vllm_config, runner.get_model(), runner.device)

    def parade_add(self, path: str) -> dict[str, Any]:
        """Remote call: read an adapter into host memory. See `ParadeManager.add_adapter`."""
        return self.model_runner.parade.add_adapter(path)

    def parade_forget(self, content_hashes: list[str]) -> None:
        """Remote call: free the host memory of adapters that no request uses. See `ParadeManager.forget_adapters`."""
        self.model_runner.parade.forget_adapters(content_hashes)
