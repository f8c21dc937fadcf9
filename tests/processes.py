"""Engines whose core and workers are processes of their own."""

import os
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path

import pytest
import torch

from tests.interpreter import INTERPRETED

# What these processes load, besides the plugin.
MODULES = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.v1.executor.multiproc_executor"]
SITE = "import tests.interpreter\n\ntests.interpreter.install()\n"


def use_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines start processes. On a CPU these are forks of one that has loaded vLLM, which takes ten seconds.

    Args:
        folder: an empty one
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Compiling a model takes longer than all that is asked of it.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    if INTERPRETED:
        (folder / "sitecustomize.py").write_text(SITE)
        path = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    if torch.cuda.is_available():
        # Other tests have used this process's GPU, and a fork cannot go on with it.
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        return
    from vllm import envs

    # The core forks its workers, as on a GPU.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    set_forkserver_preload(MODULES)
    forkserver.ensure_running()
    # On a CPU vLLM spawns, whatever the environment says.
    monkeypatch.setitem(envs.environment_variables, "VLLM_WORKER_MULTIPROC_METHOD", lambda: "forkserver")
