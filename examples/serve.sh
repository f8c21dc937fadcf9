#!/usr/bin/env bash
# The server for examples/client.py: base model and two adapters under their names, on port 8000.
# Further arguments go to `vllm serve`: examples/serve.sh --port 9000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model="$(.venv/bin/python tools/base_model.py)"
# On a CPU, vLLM would take a share of the machine's memory for its KV cache; this is in GiB.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"

exec .venv/bin/vllm serve "$model" \
    --served-model-name SmolLM2-135M-Instruct \
    --max-model-len 2048 --max-num-seqs 32 \
    --enable-parade \
    --parade-modules \
    sst2=examples/adapters/sst2 \
    '{"name": "e2e", "path": "examples/adapters/e2e", "base_model_name": "SmolLM2-135M-Instruct"}' \
    "$@"
