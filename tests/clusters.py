"""Start, inspect and stop the Ray Serve application; the test process starts a Ray instance of its own."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from testing.server import free_port
from tests.questions import FRESH, REPLICA, TIMEOUT_S, Right, check, together

APPLICATION = "parade"
ADMIN = {"authorization": "Bearer secret"}
START_TIMEOUT_S = 600
# For changes that take a second or two: noticing a death, telling a router of a replica, exporting a counter.
CHANGE_TIMEOUT_S = 120
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "PARADE_ADMIN_KEY": "secret",
    # An engine core in a separate process would load vLLM once more per engine.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
# Niceness 1 gives Serve's controller and proxies nearly a full share of a busy machine. It differs from the niceness
# of the application's processes, which the application sets itself.
CONTROLLER = {"runtime_env": {"env_vars": {"RAY_worker_niceness": "1"}}}


@dataclass(frozen=True)
class Cluster:
    """A running application."""

    url: str
    metrics_url: str
    arguments: dict[str, Any]

    def run(self, replicas: int) -> None:
        """Deploy `replicas` replicas, as `serve deploy` does from YAML; running replicas are kept."""
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

        application = ServeApplicationSchema(
            name=APPLICATION,
            import_path="vllm_parade.cluster.app:build_app",
            args=self.arguments,
            deployments=[DeploymentSchema(name="Replica", num_replicas=replicas)],
        )
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))

        def running() -> bool:
            status = serve.status().applications[APPLICATION]
            assert status.status != "DEPLOY_FAILED", status.message
            states = status.deployments["Replica"].replica_states
            return status.status == "RUNNING" and states == {"RUNNING": replicas}

        wait_until(running, START_TIMEOUT_S, f"{replicas} replicas run")

    def admin(self, method: str, route: str, body: dict[str, str] | None = None) -> httpx.Response:
        """Response of an administrator's route."""
        return httpx.request(method, f"{self.url}/v1/{route}", json=body, headers=ADMIN, timeout=TIMEOUT_S)

    def load(self, name: str, path: str) -> httpx.Response:
        return self.admin("POST", "load_parade_adapter", {"parade_name": name, "parade_path": path})

    def unload(self, name: str) -> httpx.Response:
        return self.admin("POST", "unload_parade_adapter", {"parade_name": name})

    def state(self) -> dict[str, Any]:
        """The coordinator's adapters and replicas."""
        return self.admin("GET", "parade_adapters").raise_for_status().json()

    def names(self) -> set[str]:
        return {adapter["name"] for adapter in self.state()["adapters"]}

    def replicas(self) -> dict[str, int]:
        """Process ids of the replicas, by name."""
        return {replica["name"]: replica["pid"] for replica in self.state()["replicas"]}

    def models_by_replica(self, replicas: set[str]) -> dict[str, set[str]]:
        """Names of the models that each of these replicas serves."""
        found: dict[str, set[str]] = {}

        def all_seen() -> bool:
            response = httpx.get(f"{self.url}/v1/models", timeout=TIMEOUT_S)
            found[response.headers[REPLICA]] = {card["id"] for card in response.json()["data"]}
            return found.keys() >= replicas

        wait_until(all_seen, START_TIMEOUT_S, "every replica has answered")
        return found

    def metrics(self) -> str:
        return httpx.get(self.metrics_url, timeout=TIMEOUT_S).text


def processes(title: str) -> list[psutil.Process]:
    """Descendants of this process whose command line contains `title`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's value once it is true; HTTP, key and value errors of a changing cluster count as false."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (httpx.HTTPError, KeyError, ValueError) as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what} ({last})")


def wait_for_a_share(app: Cluster, new: str, right: dict[str, Right]) -> None:
    """Send batches until the new replica answers some; the others do not take a whole batch while it has room."""

    def answers_some() -> bool:
        answers = together(app.url, [*FRESH, *FRESH])
        check([*FRESH, *FRESH], answers, right)
        return any(answer.replica == new for answer in answers)

    # Routers learn of the replica at different times.
    wait_until(answers_some, CHANGE_TIMEOUT_S, "the new replica takes its share")


@contextmanager
def cluster(replicas: int, **arguments: Any) -> Iterator[Cluster]:
    """Ray on the loopback interface, running the application built from these arguments."""
    import ray
    from ray import serve

    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    port, metrics_port = free_port(), free_port()
    try:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            # Ray replaces 127.0.0.1 by the machine's network address.
            _node_ip_address="127.0.0.2",
            _metrics_export_port=metrics_port,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port}, controller_options=CONTROLLER)
        app = Cluster(f"http://127.0.0.1:{port}", f"http://127.0.0.2:{metrics_port}/metrics", arguments)
        app.run(replicas)
        yield app
    finally:
        serve.shutdown()
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
