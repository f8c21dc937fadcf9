# SPDX-License-Identifier: Apache-2.0
"""Arguments of an application: which are refused, and which options its engines get."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray.serve")

from ray.serve.schema import ServeDeploySchema

from tests.documents import texts
from vllm_parade.cluster.app import Arguments, build_app
from vllm_parade.cluster.router import AffinityRouter

ROOT = Path(__file__).parents[2]
PAGE = "docs/ray.md"
HERE = "tests/cluster/test_app.py"
SST2 = str(ROOT / "examples/adapters/sst2")


def arguments(**given: Any) -> Arguments:
    return Arguments(**{"model": "some/model", **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"repilcas": 2}, "Extra inputs are not permitted"),
        ({"replicas": 2, "autoscaling": {"max_replicas": 3}}, "replicas is 2, but autoscaling is given too; drop one"),
        ({"engine": {"parade-modules": ["a=b"]}}, "engine.parade_modules is .*; give them as `adapters`"),
        ({"engine": {"--port": 1}}, "engine.port is 1; set it in Serve's http_options"),
        (
            {"engine": {"tensor_parallel_size": 4}, "replica_options": {"num_gpus": 1}},
            "num_gpus is 1, but engine.tensor_parallel_size is 4; give a replica 4 GPUs",
        ),
        (
            {"engine": {"tensor_parallel_size": 2, "pipeline-parallel-size": 2}, "replica_options": {"num_gpus": 2}},
            "but engine.tensor_parallel_size times engine.pipeline_parallel_size is 4; give a replica 4 GPUs",
        ),
        ({"adapters": ["sst2"]}, "expected name=path"),
        ({"adapters": [f"some/model={SST2}"]}, "adapters names 'some/model', which is the base model's name"),
    ],
)
def test_bad_arguments_are_named_with_their_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": {"max_parades": 0}}, "--max-parades is 0; expected a positive whole number"),
        ({"adapters": [f"a={SST2}", f"a={SST2}"]}, "names 'a' twice"),
        ({"adapters": ["a=/nowhere"]}, "/nowhere: no such folder"),
        ({"engine": {"max_parades": 1, "max_cpu_parades": 1}, "adapters": [f"a={SST2}", f"b={SST2}"]}, "2 adapters"),
    ],
)
def test_knobs_and_adapters_are_checked_when_the_application_is_built(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_app(arguments(**given))


def test_all_engines_get_the_same_knobs_whatever_adapters_there_are_when_they_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    given = arguments(engine={"max-num-seqs": 8, "max_parades": 4}, adapters=["sst2=examples/adapters/sst2"])
    assert given.engine_options() == {
        "model": "some/model",
        "max_num_seqs": 8,
        "max_parades": 4,
        "enable_parade": True,
        "max_cpu_parades": 256,
        "parade_sites": ["q", "v", "up"],
    }
    # Absolute, because replicas have other working directories.
    assert given.adapters[0].path == SST2


def test_the_base_models_names() -> None:
    assert arguments().base_names == ["some/model"]
    assert arguments(engine={"served_model_name": "one"}).base_names == ["one"]
    assert arguments(engine={"served-model-name": ["one", "two"]}).base_names == ["one", "two"]


def test_an_application_is_three_deployments() -> None:
    app = build_app(
        arguments(
            engine={"max_num_seqs": 8},
            adapters=[f"sst2={SST2}"],
            autoscaling={"min_replicas": 1, "max_replicas": 4},
            replica_options={"num_cpus": 2},
            placement_group_bundles=[{"CPU": 2}],
            placement_group_strategy="SPREAD",
            ingress_replicas=3,
        )
    )
    ingress = app._bound_deployment
    replicas, coordinator = (bound._bound_deployment for bound in ingress.init_args[:2])
    assert (ingress.name, replicas.name, coordinator.name) == ("Ingress", "Replica", "Coordinator")
    config = replicas._deployment_config
    assert ingress._deployment_config.num_replicas == 3
    assert coordinator._deployment_config.num_replicas == 1
    assert config.autoscaling_config.max_replicas == 4
    assert config.max_ongoing_requests == 32
    assert config.request_router_config.get_request_router_class().__name__ == AffinityRouter.__name__
    assert config.request_router_config.request_router_kwargs == {"max_num_seqs": 8, "resident": 32}
    assert replicas._replica_config.placement_group_bundles == [{"CPU": 2}]
    # They reserve no CPU, so two replicas fit on a machine with two cores.
    assert [one.ray_actor_options["num_cpus"] for one in (ingress, coordinator)] == [0, 0]


NICE = {"RAY_worker_niceness": "0"}


def runtime_envs(**options: Any) -> list[dict[str, Any]]:
    """Runtime environments of ingress, coordinator and replicas, for these options of the replicas."""
    ingress = build_app(arguments(replica_options=options))._bound_deployment
    replicas, coordinator = (bound._bound_deployment for bound in ingress.init_args[:2])
    return [one.ray_actor_options["runtime_env"] for one in (ingress, coordinator, replicas)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"env_vars": NICE}),
        ({"env_vars": {"A": "1"}, "working_dir": "/x"}, {"env_vars": {**NICE, "A": "1"}, "working_dir": "/x"}),
        ({"env_vars": {"RAY_worker_niceness": "5"}}, {"env_vars": {"RAY_worker_niceness": "5"}}),
    ],
)
def test_no_process_of_the_application_has_the_low_priority_of_rays_workers(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert runtime_envs(num_cpus=1, runtime_env=given) == [{"env_vars": NICE}, {"env_vars": NICE}, expected]


def test_a_submitted_job_hands_its_runtime_environment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve does this only for deployments without a runtime environment of their own."""
    job = {"working_dir": "gcs://x.zip", "env_vars": {"A": "1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job, "metadata": {}}))
    inherited = {**job, "env_vars": {"A": "1", **NICE}}
    assert runtime_envs(num_cpus=1) == [inherited] * 3
    assert runtime_envs(runtime_env={"env_vars": {"B": "2"}})[2] == {"env_vars": {"B": "2", **NICE}}


def test_the_examples_yaml_builds_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "examples/ray/serve.yaml").read_text()))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build_app
    # Serve, too, converts the arguments to the annotated type of the builder's parameter.
    build_app(Arguments.model_validate(application.args))


def test_the_lines_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("ray.serve.run", lambda app, name: started.append((app, name)))
    monkeypatch.chdir(ROOT)
    (text,) = texts(PAGE, f"{HERE}::test_the_lines_of_the_page", "python")
    exec(text, {})
    ((app, name),) = started
    replicas = app._bound_deployment.init_args[0]._bound_deployment
    assert (name, replicas._deployment_config.num_replicas) == ("parade", 8)


def test_the_yaml_of_the_page() -> None:
    (text,) = texts(PAGE, f"{HERE}::test_the_yaml_of_the_page", "yaml")
    given = Arguments.model_validate(yaml.safe_load(text))
    build_app(given)
    bundles = given.placement_group_bundles or []
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == given.engine["tensor_parallel_size"]
