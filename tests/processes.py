"""Engines whose core and workers run in separate processes."""

import os
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path

import pytest
import torch

from tests.interpreter import INTERPRETED

# Modules that these processes need, besides the plugin.
MODULES = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.v1.executor.multiproc_executor"]
SITE = "import tests.interpreter\n\ntests.interpreter.install()\n"


def use_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines start processes. On a CPU, fork them from one that has loaded vLLM: loading takes ten seconds.

    Args:
        folder: an empty folder
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Compiling a model takes longer than all requests of a test.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    if INTERPRETED:
        (folder / "sitecustomize.py").write_text(SITE)
        path = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    if torch.cuda.is_available():
        # Other tests have used the GPU in this process, and a forked child cannot use it again.
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        return
    from vllm import envs

    # As on a GPU, the engine core forks its workers.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    set_forkserver_preload(MODULES)
    forkserver.ensure_running()
    # On a CPU, vLLM spawns processes whatever the environment says; use the fork server instead.
    monkeypatch.setitem(envs.environment_variables, "VLLM_WORKER_MULTIPROC_METHOD", lambda: "forkserver")
