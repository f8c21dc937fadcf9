# SPDX-License-Identifier: Apache-2.0
"""The engine of a variant with its adapters."""

import fcntl
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import (
    NUM_MARKER_TOKENS,
    SIZES,
    SPECIAL_TOKENS,
    make_loras,
    make_model,
    make_parades,
    marker_tokens,
)

VARIANTS = ("base", "parade", "lora")
NUM_LORAS = 8
MAX_MODEL_LEN = 8704
# For workloads with documents of 32,000 tokens.
LONG_MODEL_LEN, LONG_WORKLOADS = 32768, {"documents", "beside"}
MAX_NUM_SEQS = 256


@dataclass(frozen=True)
class Settings:
    """Settings of one measuring process, sent to it as JSON."""

    variant: str
    size: str
    folder: str
    workloads: list[str] = field(default_factory=list)
    adapters: int = 256
    slots: int = 64
    repeats: int = 3
    kv_cache_gib: float = 44
    engine: dict[str, Any] = field(default_factory=dict)
    """Further engine arguments, the same for all variants."""
    turns: str = ""
    """Lock file of processes that run side by side; each holds it for one round of samples. Empty: no lock."""

    def to_json(self) -> str:
        """JSON for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Settings from the JSON of `to_json`."""
        return cls(**json.loads(text))

    def engine_arguments(self) -> dict[str, Any]:
        """Engine arguments that all variants share, so that their memory use is comparable."""
        return {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": LONG_MODEL_LEN if LONG_WORKLOADS & {*self.workloads} else MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
            # As in a server. `Variant.step` also needs the requests' token timestamps.
            "disable_log_stats": False,
            "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30),
            **self.engine,
        }


class Variant:
    """The engine of a variant. Each run gets new random prompts, so it hits no cache."""

    def __init__(self, settings: Settings) -> None:
        from vllm import LLM

        import vllm_parade  # noqa: F401  adds its keywords to LLM

        self.name, self.settings = settings.variant, settings
        folder = Path(settings.folder) / settings.size
        self.shape = make_model(folder, settings.size)
        options: dict[str, Any] = {"worker_extension_cls": "benchmarks.worker.WorkerExtension"}
        if self.name == "parade":
            capacity = max(settings.adapters + NUM_LORAS, settings.slots)
            options |= {"enable_parade": True, "max_parades": settings.slots, "max_cpu_parades": capacity}
        elif self.name == "lora":
            options |= {"enable_lora": True, "max_loras": NUM_LORAS, "max_lora_rank": 8}
        self.adapters = self._adapters(folder)
        self.few = self._marked(folder) if self.name == "parade" else self.adapters
        """Adapters for conversations: as many as there are LoRA adapters. Those of PARADE mark their turns."""
        self.keyword = "lora_request" if self.name == "lora" else "parade_request"
        self._random = random.Random(0)
        self.turn = Turn(settings.turns)
        started = time.perf_counter()
        self.llm = LLM(str(folder), **settings.engine_arguments(), **options)
        self.start_s = time.perf_counter() - started

    def _adapters(self, folder: Path) -> list[Any]:
        from vllm.lora.request import LoRARequest

        from vllm_parade import ParadeRequest

        if self.name == "parade":
            paths = make_parades(folder, self.shape, self.settings.adapters)
            return [ParadeRequest(f"p{number}", path) for number, path in enumerate(paths)]
        if self.name == "lora":
            paths = make_loras(folder, self.shape, NUM_LORAS)
            return [LoRARequest(f"l{number}", number + 1, path) for number, path in enumerate(paths)]
        return []

    def _marked(self, folder: Path) -> list[Any]:
        from vllm_parade import ParadeRequest

        paths = make_parades(folder, self.shape, NUM_LORAS, "marked", **marker_tokens(self.settings.size))
        return [ParadeRequest(f"m{number}", path) for number, path in enumerate(paths)]

    def words(self, length: int) -> list[int]:
        """New random tokens; none of them is a marker."""
        first, end = len(SPECIAL_TOKENS), SIZES[self.settings.size]["vocab_size"] - NUM_MARKER_TOKENS
        return self._random.choices(range(first, end), k=length)

    def message(self, length: int) -> list[int]:
        """A new user message of `length` tokens, its start and end markers included."""
        start, end = marker_tokens(self.settings.size).values()
        return [*start, *self.words(length - NUM_MARKER_TOKENS), *end]

    def prompts(self, batch: int, length: int) -> list[dict[str, list[int]]]:
        """New random prompts."""
        return [{"prompt_token_ids": self.words(length)} for _ in range(batch)]

    def chosen(self, requests: Sequence[Any], batch: int) -> dict[str, Any]:
        """The keyword argument that assigns `requests` to the prompts of a batch in turn; empty for the base model."""
        return {self.keyword: [requests[number % len(requests)] for number in range(batch)]} if requests else {}

    def run(self, batch: int, length: int, tokens: int, requests: Sequence[Any] = ()) -> float:
        """Seconds to generate `tokens` tokens for each of a batch of new prompts, which take `requests` in turn."""
        return self.ask(self.prompts(batch, length), tokens, requests)

    def ask(self, prompts: list[dict[str, list[int]]], tokens: int, requests: Sequence[Any] = ()) -> float:
        """Like `run`, for given prompts."""
        with self.turn():
            started = time.perf_counter()
            self.outputs(prompts, tokens, requests)
            return time.perf_counter() - started

    def outputs(self, prompts: list[dict[str, list[int]]], tokens: int, requests: Sequence[Any]) -> list[Any]:
        """vLLM's outputs for these prompts, which take `requests` in turn."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=False, **self.chosen(requests, len(prompts)))
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return outputs

    def step(self, batch: int, length: int, tokens: int, requests: Sequence[Any] = ()) -> float:
        """Mean seconds of a decode step with a batch of new prompts, by the engine core's clock.

        The mean covers the tokens after the first one of the request that started last. All other requests decode at
        that time; they finish a few steps earlier.
        """
        with self.turn():
            outputs = self.outputs(self.prompts(batch, length), tokens, requests)
        last = max((output.metrics for output in outputs), key=lambda times: times.first_token_ts)
        return (last.last_token_ts - last.first_token_ts) / (tokens - 1)

    def beam_search(self, width: int, length: int, tokens: int, requests: Sequence[Any] = ()) -> float:
        """Seconds of a beam search for one new prompt."""
        from vllm.sampling_params import BeamSearchParams

        prompts, chosen = self.prompts(1, length), self.chosen(requests, 1)
        params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
        with self.turn():
            started = time.perf_counter()
            self.llm.beam_search(prompts, params, **chosen)
            return time.perf_counter() - started

    def set_static(self, static: bool) -> None:
        """Switch the generators off (True) or on; see `worker.WorkerExtension`."""
        self.llm.collective_rpc("parade_static", args=(static,))

    def recorded(
        self, batch: int, length: int, tokens: int, requests: Sequence[Any] = ()
    ) -> list[dict[str, tuple[int, float]]]:
        """Run new prompts under the profiler; returns each worker's counts and microseconds by name of kernel."""
        self.llm.collective_rpc("start_recording")
        self.run(batch, length, tokens, requests)
        return self.llm.collective_rpc("stop_recording")

    def cache_tokens(self) -> int:
        """Number of tokens that the KV cache holds."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def step_tokens(self) -> int:
        """Maximum number of tokens in a step."""
        return self.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens

    def rows(self) -> int | None:
        """Number of rows of the vector tables; None without PARADE."""
        if self.name != "parade":
            return None
        from vllm_parade.config import ServingConfig

        config = self.llm.llm_engine.vllm_config
        return ServingConfig.from_vllm_config(config).num_rows(config.scheduler_config.max_num_seqs)

    def allocated_mib(self) -> float | None:
        """Peak device memory of the first worker's tensors; None without a GPU."""
        return self.llm.collective_rpc("allocated_bytes")[0] / 2**20 if torch.cuda.is_available() else None

    def parade_mib(self) -> dict[str, float]:
        """Device memory of tables and slots on the first worker; empty without PARADE."""
        if self.name != "parade":
            return {}
        return {f"{part}_mib": size / 2**20 for part, size in self.llm.collective_rpc("parade_bytes")[0].items()}


class Turn:
    """A lock file shared by processes that measure side by side; does nothing without a file."""

    def __init__(self, path: str) -> None:
        self.path, self._taken = path, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait for the lock. A nested call inside it does not lock again."""
        if not self.path or self._taken:
            yield
            return
        with open(self.path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._taken = True
            yield
            self._taken = False
        # Let a waiting process take the lock next.
        time.sleep(0.01)


def used_mib() -> float | None:
    """Used memory of the whole device, over all processes, in MiB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
