# SPDX-License-Identifier: Apache-2.0
"""The Ray Serve application, built from Python (`serve.run(build_app(arguments))`) or from YAML (`serve run`)."""

import json
import math
import os
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, Field, field_validator, model_validator
from ray import serve
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.job_config import JobConfig
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from vllm_parade.adapter import load_config
from vllm_parade.cluster.coordinator import Coordinator
from vllm_parade.cluster.ingress import Ingress
from vllm_parade.cluster.replica import Replica
from vllm_parade.cluster.router import AffinityRouter
from vllm_parade.config import MOST_HOST_ADAPTERS, ParadeModule, ServingConfig, given_sites

# Concurrent requests that Serve allows to the ingress and to the coordinator, which only wait.
MANY = 100_000
HEALTH_CHECK_S = 5.0
# Serve notices a dead coordinator at its next check. Adapters cannot be changed before that.
COORDINATOR_CHECK_S = 1.0
# Ray starts workers at niceness 15: one busy process at niceness 0 leaves them 3 % of a core. Each worker reads this
# variable from its environment.
NICENESS = {"RAY_worker_niceness": "0"}
# Flags of `vllm serve` that the application sets itself, and what to use instead.
ELSEWHERE = {
    "model": "give it as `model`",
    "parade_modules": "give them as `adapters`",
    "host": "set it in Serve's http_options",
    "port": "set it in Serve's http_options",
    "api_server_count": "raise `ingress_replicas`",
    "data_parallel_size": "raise `replicas`",
}


class Arguments(BaseModel, extra="forbid"):
    """Arguments of the application: `args` in the YAML."""

    model: str
    """The base model: its name on the Hub, or a folder that exists on all machines."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Flags of `vllm serve` for every replica, including PARADE's: {"max_model_len": 2048, "max_parades": 8}."""
    adapters: list[Any] = Field(default_factory=list)
    """Adapters to load at startup: name=path, or {"name": ..., "path": ..., "base_model_name": ...}."""
    replicas: int = Field(1, ge=1)
    """Number of replicas; each runs one engine."""
    autoscaling: dict[str, Any] | None = None
    """Serve's autoscaling_config, instead of `replicas`."""
    replica_options: dict[str, Any] = Field(default_factory=dict)
    """Ray options of a replica: num_cpus, num_gpus (tensor times pipeline parallel size), resources, runtime_env."""
    placement_group_bundles: list[dict[str, float]] | None = None
    """Resources of a replica that spans machines; the first bundle is for the replica's own process."""
    placement_group_strategy: str | None = None
    """PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    max_ongoing_requests: int | None = Field(None, ge=1)
    """Requests that may wait or run on one replica; others wait in the ingress. Default: four times max_num_seqs."""
    ingress_replicas: int = Field(1, ge=1)
    """Number of processes that receive requests from Serve's proxies."""

    @field_validator("engine")
    @classmethod
    def _name_flags(cls, engine: dict[str, Any]) -> dict[str, Any]:
        engine = {name.removeprefix("--").replace("-", "_"): value for name, value in engine.items()}
        for name in engine.keys() & ELSEWHERE.keys():
            raise ValueError(f"engine.{name} is {engine[name]!r}; {ELSEWHERE[name]}")
        return engine

    @field_validator("adapters")
    @classmethod
    def _parse_adapters(cls, adapters: list[Any]) -> list[ParadeModule]:
        modules = [ParadeModule.parse(adapter) for adapter in adapters]
        return [ParadeModule(one.name, str(Path(one.path).absolute()), one.base_model_name) for one in modules]

    @model_validator(mode="after")
    def _check(self) -> "Arguments":
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError(f"replicas is {self.replicas}, but autoscaling is given too; drop one of them")
        gpus = self.replica_options.get("num_gpus", 0)
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        size = math.prod(int(self.engine.get(name, 1)) for name in sizes)
        if gpus and gpus < size and not self.placement_group_bundles:
            given = " times ".join(f"engine.{name}" for name in sizes if name in self.engine)
            raise ValueError(f"replica_options.num_gpus is {gpus}, but {given} is {size}; give a replica {size} GPUs")
        names = [module.name for module in self.adapters]
        for name in self.base_names:
            if name in names:
                raise ValueError(f"adapters names {name!r}, which is the base model's name; rename one of them")
        return self

    @property
    def base_names(self) -> list[str]:
        """Served names of the base model."""
        given = self.engine.get("served_model_name") or self.model
        return list(given) if isinstance(given, list) else [given]

    @property
    def max_num_seqs(self) -> int:
        """vLLM's max_num_seqs, by default 256. vLLM's own default depends on the device; the router needs a number."""
        return int(self.engine.get("max_num_seqs") or 256)

    def serving_config(self) -> ServingConfig:
        """PARADE's flags, computed once for all replicas, because a later replica may see other adapters.

        Raises:
            ServingConfigError, AdapterError: names the flag or the file, and the remedy.
        """
        knobs = {name: self.engine[name] for name in ServingConfig.__dataclass_fields__ if name in self.engine}
        config = ServingConfig.from_dict({**knobs, "enable_parade": True, "parade_modules": self.adapters})
        sites = config.parade_sites or given_sites([load_config(module.path).sites for module in self.adapters])
        # Every loaded adapter stays in host memory, so the capacity is a count and not a share of memory.
        capacity = config.max_cpu_parades or max(config.least_cpu_parades, MOST_HOST_ADAPTERS)
        return ServingConfig.from_dict({**vars(config), "parade_sites": sites, "max_cpu_parades": capacity})

    def engine_options(self) -> dict[str, Any]:
        """Engine flags of every replica."""
        config = self.serving_config()
        knobs = {"parade_sites": list(config.sites), "max_cpu_parades": config.max_cpu_parades, "enable_parade": True}
        return {**self.engine, "model": self.model, "max_num_seqs": self.max_num_seqs, **knobs}

    def replica_settings(self) -> dict[str, Any]:
        """Serve's deployment options for the replicas."""
        router = {"max_num_seqs": self.max_num_seqs, "resident": self.serving_config().max_parades}
        given = {
            "num_replicas": self.replicas if self.autoscaling is None else None,
            "autoscaling_config": self.autoscaling,
            "placement_group_bundles": self.placement_group_bundles,
            "placement_group_strategy": self.placement_group_strategy,
        }
        return {
            "ray_actor_options": at_usual_priority(self.replica_options),
            "max_ongoing_requests": self.max_ongoing_requests or 4 * self.max_num_seqs,
            "health_check_period_s": HEALTH_CHECK_S,
            "request_router_config": RequestRouterConfig(
                request_router_class=AffinityRouter, request_router_kwargs=router
            ),
            **{name: value for name, value in given.items() if value is not None},
        }


def at_usual_priority(options: dict[str, Any]) -> dict[str, Any]:
    """Ray actor options with niceness 0, unless the env_vars in `options` set another one."""
    given = options.get("runtime_env") or {}
    # A deployment inherits the driver's runtime environment only if it has none of its own.
    inherited = {} if given else driver_runtime_env()
    env_vars = {**inherited.get("env_vars", {}), **NICENESS, **given.get("env_vars", {})}
    return {**options, "runtime_env": {**inherited, **given, "env_vars": env_vars}}


def driver_runtime_env() -> dict[str, Any]:
    """The runtime environment of this process, or the one that a submitted job gets when it connects to Ray."""
    if ray.is_initialized():
        return dict(ray.get_runtime_context().runtime_env)
    job = JobConfig.from_json(json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")))
    return dict(job.runtime_env or {})


def build_app(arguments: Arguments) -> Application:
    """Build the application for `serve.run`. A YAML names this function as `import_path`.

    If the application needs the driver's `runtime_env`, call `ray.init` first.

    Raises:
        ValueError: an argument cannot be used; the message names it and the remedy.
    """
    arguments = Arguments.model_validate(arguments)
    # Ingress and coordinator mostly wait, so they reserve no core. The coordinator's access log is off: it would get a
    # line for every poll of a replica.
    options = at_usual_priority({"num_cpus": 0})
    waiting: dict[str, Any] = {"max_ongoing_requests": MANY, "ray_actor_options": options}
    quiet = {"health_check_period_s": COORDINATOR_CHECK_S, "logging_config": LoggingConfig(enable_access_log=False)}
    coordinator = serve.deployment(**waiting, **quiet)(Coordinator)
    adapters = coordinator.bind(arguments.adapters, arguments.base_names)
    replicas = serve.deployment(**arguments.replica_settings())(Replica).bind(arguments.engine_options(), adapters)
    ingress = serve.deployment(num_replicas=arguments.ingress_replicas, **waiting)(Ingress)
    return ingress.bind(replicas, adapters, arguments.base_names)
