# SPDX-License-Identifier: Apache-2.0
"""Before an engine starts: read the options, refuse unsupported configurations, choose scheduler and worker."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_parade.adapter import AdapterError, BaseModelShape, load_adapter, load_config
from vllm_parade.config import (
    CONFIG_KEY,
    MOST_HOST_ADAPTERS,
    AdditionalConfig,
    ServingConfig,
    ServingConfigError,
    given_sites,
)
from vllm_parade.frontend.arguments import COMMAND_LINE
from vllm_parade.ops import OVERRIDE, use_kernels
from vllm_parade.ops.packed import max_entries

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.parade.startup")

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# By default, adapters may take an eighth of the machine's memory.
HOST_MEMORY_SHARE = 8
# Methods for which tests show that drafting changes no token.
SPECULATIVE_METHODS = ("ngram", "draft_model")
SCHEDULERS = {False: "vllm_parade.scheduler.ParadeScheduler", True: "vllm_parade.scheduler.ParadeAsyncScheduler"}
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_parade.worker.cpu.ParadeCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_parade.worker.gpu.ParadeGPUWorker",
}


def create_engine_config(
    wrapped: Callable[..., "VllmConfig"], instance: "EngineArgs", args: tuple, kwargs: dict[str, Any]
) -> "VllmConfig":
    """Wraps EngineArgs.create_engine_config: set up an engine for PARADE if it is enabled."""
    additional = instance.additional_config or {}
    if CONFIG_KEY not in additional:
        return wrapped(*args, **kwargs)
    values = dict(additional[CONFIG_KEY])
    command_line = values.pop(COMMAND_LINE, False)
    # Adapters' names and paths must not enter vLLM's config hash. `_enable` adds the entries that must.
    instance.additional_config = {key: value for key, value in additional.items() if key != CONFIG_KEY}
    try:
        config = ServingConfig.from_dict(values)
        if not config.enable_parade:
            return wrapped(*args, **kwargs)
        vllm_config = wrapped(*args, **kwargs)
        _enable(vllm_config, config, instance.served_model_name)
    except (ServingConfigError, AdapterError) as error:
        if not command_line:
            raise
        logger.error("PARADE: %s", error)
        raise SystemExit(1) from None
    finally:
        instance.additional_config = additional
    return vllm_config


def _enable(vllm_config: "VllmConfig", config: ServingConfig, served_names: str | list[str] | None) -> None:
    refuse_unsupported(vllm_config)
    config = _with_host_capacity(_with_sites(config), vllm_config)
    _check_names(vllm_config, config, [served_names] if isinstance(served_names, str) else served_names or [])
    _check_modules(vllm_config, config)
    vllm_config.scheduler_config.scheduler_cls = SCHEDULERS[bool(vllm_config.scheduler_config.async_scheduling)]
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.parallel_config.worker_cls]
    num_rows = config.num_rows(vllm_config.scheduler_config.max_num_seqs)
    entries = {**vllm_config.additional_config, CONFIG_KEY: config.hashed(num_rows)}
    vllm_config.additional_config = AdditionalConfig(entries, config)


def _with_sites(config: ServingConfig) -> ServingConfig:
    if config.parade_sites is not None:
        return config
    return replace(config, parade_sites=given_sites([load_config(m.path).sites for m in config.parade_modules]))


def _with_host_capacity(config: ServingConfig, vllm_config: "VllmConfig") -> ServingConfig:
    if config.max_cpu_parades is not None:
        return config
    shape = BaseModelShape.from_hf_config(vllm_config.model_config.hf_text_config)
    width = shape.output_width(config.sites)
    entries = max_entries(shape.num_layers, shape.hidden_size, width, config.max_parade_rank)
    share = psutil.virtual_memory().total // HOST_MEMORY_SHARE
    fits = share // (entries * vllm_config.model_config.dtype.itemsize)
    return replace(config, max_cpu_parades=max(config.least_cpu_parades, min(fits, MOST_HOST_ADAPTERS)))


def _check_names(vllm_config: "VllmConfig", config: ServingConfig, served_names: list[str]) -> None:
    """Refuse adapters named like the base model. The model config has only the first of its served names."""
    for module in config.parade_modules:
        if module.name in (vllm_config.model_config.served_model_name, *served_names):
            raise ServingConfigError(
                f"--parade-modules names {module.name!r}, which is the base model's name; rename one of them"
            )


def _check_modules(vllm_config: "VllmConfig", config: ServingConfig) -> None:
    """Read every adapter of --parade-modules, so that a bad one fails before the model is loaded."""
    shape = BaseModelShape.from_hf_config(vllm_config.model_config.hf_text_config)
    with _one_thread():
        for module in config.parade_modules:
            load_adapter(module.path, shape, max_rank=config.max_parade_rank, sites=config.sites)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch from starting OpenMP threads. On GPUs, vLLM then forks its engine; a fork of a process with OpenMP
    threads hangs in its first parallel operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Refuse configurations that could give wrong answers.

    Raises:
        ServingConfigError: names the flag, the reason and the remedy.
    """
    for flag, wanted, reason in _unsupported(vllm_config):
        if wanted:
            raise ServingConfigError(f"{flag} cannot be used with --enable-parade: {reason}")


def _unsupported(vllm_config: "VllmConfig") -> list[tuple[str, bool, str]]:
    model, parallel, scheduler = vllm_config.model_config, vllm_config.parallel_config, vllm_config.scheduler_config
    compilation, speculative = vllm_config.compilation_config, vllm_config.speculative_config
    # The class that vLLM builds. --model-impl can select another one than the model's config names.
    architecture = model.architecture
    environment = {name: os.environ.get(name, "0") not in ("", "0") for name in os.environ}
    return [
        (
            f"model architecture {architecture}",
            architecture not in ARCHITECTURES or model.is_encoder_decoder,
            f"supported are {', '.join(ARCHITECTURES)}, each in vLLM's own implementation",
        ),
        ("--runner pooling", model.runner_type == "pooling", "pooling models generate no text"),
        (
            "VLLM_USE_RUST_FRONTEND",
            environment.get("VLLM_USE_RUST_FRONTEND", False),
            "the Rust front end bypasses the plugin; unset it",
        ),
        (
            "VLLM_USE_BREAKABLE_CUDAGRAPH",
            is_breakable_cudagraph_enabled(),
            "its graphs would replay a step without generators; unset it",
        ),
        (
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", False),
            "its routes could remove or replace a PARADE adapter's name; unset it",
        ),
        ("--enable-lora", vllm_config.lora_config is not None, "one engine serves LoRA or PARADE adapters, not both"),
        (
            "--speculative-config",
            speculative is not None and speculative.method not in SPECULATIVE_METHODS,
            f"supported methods are {', '.join(SPECULATIVE_METHODS)}",
        ),
        (
            "--enable-dbo" if parallel.enable_dbo else f"--ubatch-size {parallel.ubatch_size}",
            bool(parallel.use_ubatching),
            "vectors are looked up by token position, and micro-batches count positions from 0; drop it",
        ),
        (
            "--prefill-context-parallel-size",
            parallel.prefill_context_parallel_size > 1,
            "a generator must see the whole prompt on one rank; leave it at 1",
        ),
        (
            "--data-parallel-size",
            parallel.data_parallel_size > 1,
            "adapters cannot be loaded safely on all engines; start one server per replica",
        ),
        (
            "--api-server-count",
            parallel._api_process_count > 1,
            "one front end must know all adapters in the workers' host memory; leave it at 1",
        ),
        (
            "--speculative-config with --pipeline-parallel-size",
            speculative is not None and parallel.pipeline_parallel_size > 1,
            "not tested; drop one of them",
        ),
        (
            "--kv-transfer-config",
            vllm_config.kv_transfer_config is not None,
            "a prompt's vectors would not be transferred with its keys and values; drop it",
        ),
        (
            "sequence parallelism (compilation_config.pass_config.enable_sp)",
            bool(getattr(compilation.pass_config, "enable_sp", False)),
            "vectors are looked up by token position, and it splits up the positions; disable it",
        ),
        (
            f"{OVERRIDE}=reference",
            current_platform.is_cuda()
            and compilation.cudagraph_mode.has_piecewise_cudagraphs()
            and not use_kernels("cuda"),
            "CUDA graphs cannot capture the reference generator; unset it, or add --enforce-eager",
        ),
        (
            f"cudagraph_mode {compilation.cudagraph_mode}",
            _captures_prompts(compilation),
            "its graphs of steps with prompts contain no generators; use FULL_AND_PIECEWISE or PIECEWISE",
        ),
        (
            "--enable-sleep-mode",
            bool(getattr(model, "enable_sleep_mode", False)),
            "the vectors of waiting requests would be lost; drop it",
        ),
        (
            "--long-prefill-token-threshold",
            scheduler.long_prefill_token_threshold > 0,
            "it splits prompts, and an adapter must read a whole prompt in one step; set it to 0",
        ),
        (
            "--scheduler-cls",
            scheduler.scheduler_cls is not None,
            "PARADE sets its own scheduler class; drop the flag",
        ),
        (
            f"--worker-cls {parallel.worker_cls}",
            parallel.worker_cls not in WORKERS,
            f"PARADE replaces only the classes {', '.join(WORKERS)}; drop the flag",
        ),
    ]


def _captures_prompts(compilation: "CompilationConfig") -> bool:
    from vllm.config import CUDAGraphMode

    mode = compilation.cudagraph_mode.mixed_mode()
    return bool(mode == CUDAGraphMode.FULL or (mode == CUDAGraphMode.PIECEWISE and not compilation.splitting_ops))
