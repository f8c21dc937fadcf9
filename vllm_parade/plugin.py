# SPDX-License-Identifier: Apache-2.0
"""The plugin's entry point, and the list of all vLLM methods that vllm_parade wraps.

Most of the integration uses vLLM's extension points: general plugins, `scheduler_cls`, `worker_cls`,
`additional_config`, `extra_args`, `cache_salt`. A seam is a method that is wrapped because no extension point exists;
patches/README.md gives the reason for each and when it can be removed. Without PARADE enabled, seams change nothing.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import wrapt

from vllm_parade import compat
from vllm_parade.cluster import lifeline

FRONTEND = "vllm_parade.frontend"


@dataclass(frozen=True)
class Seam:
    """One wrapped method of vLLM."""

    module: str
    """Module of vLLM that defines it."""
    method: str
    """Class and method, or a function."""
    wrapper: str
    """Our function as `module:name`. Its parameters are wrapt's: (wrapped, instance, args, kwargs)."""
    needs: tuple[str, ...] = ()
    """Parameters of the method that the wrapper relies on."""

    @property
    def owner(self) -> Any:
        """The class, or the module of a function."""
        module = import_module(self.module)
        class_name = self.method.rpartition(".")[0]
        return getattr(module, class_name) if class_name else module

    def install(self) -> None:
        """Wrap the method. Does nothing if it is already wrapped."""
        if getattr(vars(self.owner)[self.method.rpartition(".")[2]], "_self_parade_seam", False):
            return
        wrapper_module, wrapper_name = self.wrapper.split(":")
        wrapper = getattr(import_module(wrapper_module), wrapper_name)
        # wrapt stores attributes that begin with _self_ on the proxy, not on the wrapped method.
        proxy: Any = wrapt.wrap_function_wrapper(self.module, self.method, wrapper)
        proxy._self_parade_seam = True


KEYWORD_SEAMS = (
    Seam("vllm.engine.arg_utils", "EngineArgs.__init__", f"{FRONTEND}.arguments:accept_keywords"),
    Seam("vllm.engine.arg_utils", "AsyncEngineArgs.__init__", f"{FRONTEND}.arguments:accept_keywords"),
)
SEAMS = (
    *KEYWORD_SEAMS,
    Seam("vllm.engine.arg_utils", "EngineArgs.add_cli_args", f"{FRONTEND}.arguments:add_flags", ("parser",)),
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", f"{FRONTEND}.startup:create_engine_config"),
    Seam("vllm.entrypoints.llm", "LLM.generate", f"{FRONTEND}.offline:generate", ("lora_request",)),
    Seam("vllm.entrypoints.llm", "LLM.enqueue", f"{FRONTEND}.offline:generate", ("lora_request",)),
    Seam("vllm.entrypoints.llm", "LLM.chat", f"{FRONTEND}.offline:generate", ("lora_request",)),
    Seam(
        "vllm.entrypoints.generate.beam_search.offline",
        "BeamSearchOfflineMixin.beam_search",
        f"{FRONTEND}.offline:beam_search",
        ("prompts", "lora_request"),
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        f"{FRONTEND}.online:beam_search",
        ("lora_request",),
    ),
    Seam(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.init_static_loras",
        f"{FRONTEND}.online:init_static_loras",
    ),
    Seam(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.add_request",
        f"{FRONTEND}.held:add_request",
        ("request_id", "params", "lora_request"),
    ),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine.step", f"{FRONTEND}.held:step"),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine.has_unfinished_requests", f"{FRONTEND}.held:has_unfinished_requests"),
    Seam(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.get_num_unfinished_requests",
        f"{FRONTEND}.held:get_num_unfinished_requests",
    ),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine.abort_request", f"{FRONTEND}.held:abort_request", ("request_ids",)),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.add_request", f"{FRONTEND}.online:add_request", ("lora_request",)),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        f"{FRONTEND}.inputs:process_inputs",
        ("params", "lora_request", "resumable"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "_gen_prompt_embeds_extra_hash_keys",
        "vllm_parade.scheduler.block_keys:add_turn_keys",
        ("request", "start_token_idx", "end_token_idx"),
    ),
    Seam(
        "vllm.v1.metrics.loggers", "StatLoggerManager.__init__", f"{FRONTEND}.metrics:add_stat_logger", ("vllm_config",)
    ),
)


def install_keyword_seams() -> None:
    """Make `EngineArgs` accept PARADE's keywords, now or as soon as its module is imported."""

    def install(_: Any) -> None:
        for seam in KEYWORD_SEAMS:
            seam.install()

    wrapt.register_post_import_hook(install, "vllm.engine.arg_utils")


def register() -> None:
    """Entry point of `vllm.general_plugins`. vLLM calls it in each of its processes, possibly more than once."""
    from vllm.logger import init_logger

    lifeline.follow()
    version = compat.installed_version()
    if not compat.is_supported(version):
        init_logger("vllm.parade").error(compat.unsupported_message(version))
        return
    for seam in SEAMS:
        seam.install()
