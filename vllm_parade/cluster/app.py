# SPDX-License-Identifier: Apache-2.0
"""PARADE on Ray Serve: the application, from code (`serve.run(build_app(arguments))`) or from YAML (`serve run`)."""

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

# Requests at a time that Serve lets through to the ingress and to the coordinator, which only wait.
MANY = 100_000
HEALTH_CHECK_S = 5.0
# Serve notices a death at its next check; until then adapters cannot be changed.
COORDINATOR_CHECK_S = 1.0
# Ray starts its workers at niceness 15, where one busy process of niceness 0 leaves them 3 % of a core. A worker reads
# this from its environment.
NICENESS = {"RAY_worker_niceness": "0"}
# Flags that make no sense here, and what to give instead.
ELSEWHERE = {
    "model": "give it as `model`",
    "parade_modules": "give them as `adapters`",
    "host": "Serve's http_options have it",
    "port": "Serve's http_options have it",
    "api_server_count": "raise `ingress_replicas`",
    "data_parallel_size": "raise `replicas`",
}


class Arguments(BaseModel, extra="forbid"):
    """What an application is built from; `args` of the YAML."""

    model: str
    """The base model: name on the Hub, or folder that all machines have."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Flags of `vllm serve` for every replica, PARADE's among them: {"max_model_len": 2048, "max_parades": 8}."""
    adapters: list[Any] = Field(default_factory=list)
    """Adapters served from the start: name=path, or {"name": ..., "path": ..., "base_model_name": ...}."""
    replicas: int = Field(1, ge=1)
    """Engines."""
    autoscaling: dict[str, Any] | None = None
    """Serve's autoscaling_config, instead of `replicas`."""
    replica_options: dict[str, Any] = Field(default_factory=dict)
    """Ray's options of a replica: num_cpus, num_gpus (tensor times pipeline parallel size), resources, runtime_env."""
    placement_group_bundles: list[dict[str, float]] | None = None
    """Resources of a replica that spans machines; the first bundle is the replica's own process."""
    placement_group_strategy: str | None = None
    """PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    max_ongoing_requests: int | None = Field(None, ge=1)
    """Requests that wait or run on a replica; more wait in the ingress. By default four times max_num_seqs."""
    ingress_replicas: int = Field(1, ge=1)
    """Processes that take requests from Serve's proxies."""

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
        """Names under which the base model is served."""
        given = self.engine.get("served_model_name") or self.model
        return list(given) if isinstance(given, list) else [given]

    @property
    def max_num_seqs(self) -> int:
        """Requests that an engine runs at a time; vLLM's default depends on the device, and the router must know."""
        return int(self.engine.get("max_num_seqs") or 256)

    def serving_config(self) -> ServingConfig:
        """PARADE's knobs, the same for all replicas: those that start later know other adapters.

        Raises:
            ServingConfigError, AdapterError: names the knob or the file, and the remedy.
        """
        knobs = {name: self.engine[name] for name in ServingConfig.__dataclass_fields__ if name in self.engine}
        config = ServingConfig.from_dict({**knobs, "enable_parade": True, "parade_modules": self.adapters})
        sites = config.parade_sites or given_sites([load_config(module.path).sites for module in self.adapters])
        # Adapters that an administrator loads are all kept, so no share of memory limits them.
        capacity = config.max_cpu_parades or max(config.least_cpu_parades, MOST_HOST_ADAPTERS)
        return ServingConfig.from_dict({**vars(config), "parade_sites": sites, "max_cpu_parades": capacity})

    def engine_options(self) -> dict[str, Any]:
        """Flags of every replica's engine."""
        config = self.serving_config()
        knobs = {"parade_sites": list(config.sites), "max_cpu_parades": config.max_cpu_parades, "enable_parade": True}
        return {**self.engine, "model": self.model, "max_num_seqs": self.max_num_seqs, **knobs}

    def replica_settings(self) -> dict[str, Any]:
        """Serve's options of the deployment of replicas."""
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
    """Ray's options of an actor at niceness 0, unless the environment variables in them say otherwise."""
    given = options.get("runtime_env") or {}
    # Serve gives the driver's runtime environment only to deployments that have none.
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
    """The application; `serve.run` takes it, and a YAML names this function as `import_path`.

    Where the driver has a `runtime_env` that the application needs, call `ray.init` first.

    Raises:
        ValueError: an argument that cannot be used; the message names it and the remedy.
    """
    arguments = Arguments.model_validate(arguments)
    # Both of them mostly wait, which needs no core of their own; and not every replica that waits for news is a line in
    # the log.
    options = at_usual_priority({"num_cpus": 0})
    waiting: dict[str, Any] = {"max_ongoing_requests": MANY, "ray_actor_options": options}
    quiet = {"health_check_period_s": COORDINATOR_CHECK_S, "logging_config": LoggingConfig(enable_access_log=False)}
    coordinator = serve.deployment(**waiting, **quiet)(Coordinator)
    adapters = coordinator.bind(arguments.adapters, arguments.base_names)
    replicas = serve.deployment(**arguments.replica_settings())(Replica).bind(arguments.engine_options(), adapters)
    ingress = serve.deployment(num_replicas=arguments.ingress_replicas, **waiting)(Ingress)
    return ingress.bind(replicas, adapters, arguments.base_names)
