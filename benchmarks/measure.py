# SPDX-License-Identifier: Apache-2.0
"""One engine, one variant, all its points: run as a process of its own, prints one line of JSON per point.

A point is a batch of prompts of one length. Its time to first token is the time in which the batch has one token each;
its decode step is what every further token takes. Prompts are never repeated, so nothing comes from a cache.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import make_loras, make_model, make_parades

VARIANTS = ("base", "unused", "parade", "lora")
DECODE_TOKENS = 64


class Variant:
    """An engine with the adapters of a variant."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        from vllm import LLM

        import vllm_parade

        self.name, self.args = name, args
        args.folder.mkdir(parents=True, exist_ok=True)
        self.shape = make_model(args.folder / args.size, args.size)
        self.vocab = 900
        self.seed = 0
        options: dict[str, Any] = {}
        self.requests: list[Any] = [None]
        if name in ("unused", "parade"):
            options = {
                "enable_parade": True,
                "max_parades": args.slots,
                "max_cpu_parades": max(args.slots, args.adapters),
            }
        if name == "parade":
            paths = make_parades(args.folder / args.size, self.shape, args.adapters)
            self.requests = [vllm_parade.ParadeRequest(f"p{n}", path) for n, path in enumerate(paths)]
        if name == "lora":
            options = {"enable_lora": True, "max_loras": args.loras, "max_lora_rank": 8}
            self.requests = self._lora_requests()
        started = time.perf_counter()
        self.llm = LLM(
            str(args.folder / args.size),
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=args.max_model_len,
            max_num_seqs=256,
            **options,
            **json.loads(args.engine),
        )
        self.report(point="start", seconds=time.perf_counter() - started)

    def _lora_requests(self) -> list[Any]:
        from vllm.lora.request import LoRARequest

        paths = make_loras(self.args.folder / self.args.size, self.shape, self.args.loras)
        return [LoRARequest(f"l{n}", n + 1, path) for n, path in enumerate(paths)]

    def report(self, **values: Any) -> None:
        """Print a line of results."""
        print("RESULT " + json.dumps({"variant": self.name, **values}), flush=True)

    def run(self, batch: int, length: int, tokens: int) -> float:
        """Seconds for a batch of fresh prompts, `tokens` tokens each, each request with the next adapter."""
        from vllm import SamplingParams

        self.seed += 1
        random = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(1, self.vocab, (batch, length), generator=random).tolist()
        prompts = [{"prompt_token_ids": row} for row in ids]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        keyword = "lora_request" if self.name == "lora" else "parade_request"
        requests = [self.requests[n % len(self.requests)] for n in range(batch)]
        chosen = {} if self.requests == [None] else {keyword: requests}
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False, **chosen)
        seconds = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return seconds

    def point(self, batch: int, length: int) -> None:
        """Measure and report one point: medians after a warm-up."""
        self.run(batch, length, 4)
        first = sorted(self.run(batch, length, 1) for _ in range(self.args.repeats))
        long = sorted(self.run(batch, length, 1 + DECODE_TOKENS) for _ in range(self.args.repeats))
        decode = (statistics.median(long) - statistics.median(first)) / DECODE_TOKENS
        self.report(
            point="latency",
            batch=batch,
            length=length,
            ttft_ms=1e3 * statistics.median(first),
            ttft_ms_all=[round(1e3 * value, 2) for value in first],
            decode_ms=1e3 * decode,
            total_ms_all=[round(1e3 * value, 2) for value in long],
            tokens_per_s=batch * (1 + DECODE_TOKENS) / statistics.median(long),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--size", default="llama2-7b")
    parser.add_argument("--folder", type=Path, required=True, help="where models and adapters are made")
    parser.add_argument("--points", default="1x274,32x274,256x274,1x8192", help="batch x prompt length, ...")
    parser.add_argument("--adapters", type=int, default=256, help="PARADE adapters")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--loras", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=8704)
    parser.add_argument("--engine", default="{}", help="further engine arguments as JSON")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Making adapters starts OpenMP threads, and a fork of a process that has them hangs.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    variant = Variant(args.variant, args)
    for point in args.points.split(","):
        batch, length = map(int, point.split("x"))
        variant.point(batch, length)
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    variant.report(point="memory", used_mib=(total - free) / 2**20)


if __name__ == "__main__":
    main()
