# SPDX-License-Identifier: Apache-2.0
"""On GPUs, vLLM forks its engine. Threads that the plugin started before the fork must not hang the child."""

import os
import subprocess
import sys

CHILD = """
import os, signal, sys
from vllm.engine.arg_utils import EngineArgs
import vllm_parade
EngineArgs(
    model=sys.argv[1],
    skip_tokenizer_init=True,
    enable_parade=True,
    max_parade_rank=64,
    parade_modules=["a=" + sys.argv[2]],
).create_engine_config()
import torch
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    # Hangs where the parent has OpenMP threads: a fork leaves them behind, and the child waits for them.
    torch.ones(4_000_000).isfinite().sum()
    os._exit(0)
sys.exit(os.waitpid(pid, 0)[1])
"""


def test_reading_static_adapters_leaves_no_threads_behind(tmp_path):
    from transformers import LlamaConfig

    from testing.random_models import make_adapter
    from vllm_parade.adapter import BaseModelShape

    # Large enough for PyTorch to use several threads when it checks the adapter for NaN.
    config = LlamaConfig(hidden_size=1024, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=8)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    adapter = make_adapter(tmp_path / "a", BaseModelShape.from_hf_config(config), 0, r=64)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model"), adapter.path]
    # With one thread, there would be no OpenMP threads to lose at the fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
