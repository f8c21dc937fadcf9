# SPDX-License-Identifier: Apache-2.0
"""One engine of a variant with its adapters, and what a worker is asked while measuring."""

import fcntl
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import SIZES, SPECIAL_TOKENS, make_loras, make_model, make_parades

VARIANTS = ("base", "parade", "lora")
NUM_LORAS = 8
MAX_MODEL_LEN = 8704
MAX_NUM_SEQS = 256


@dataclass(frozen=True)
class Settings:
    """What one measuring process does; travels to it as JSON."""

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
    """A file that processes which run side by side lock in turn, each for a round of samples."""

    def to_json(self) -> str:
        """The form that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments that all variants share, so that their memory can be compared."""
        return {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
            # As in a server; and they tell when a request had its tokens.
            "disable_log_stats": False,
            "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30),
            **self.engine,
        }


# What GPUs (or CPUs) call what they tell each other.
COLLECTIVE = re.compile(
    r"nccl|gloo:|shm_(all|send|recv)|cross_device|all_?reduce|all_?gather|reduce_?scatter|broadcast_?kernel",
    re.IGNORECASE,
)


class WorkerExtension:
    """Remote calls that vLLM mixes into the workers (`worker_extension_cls`)."""

    def start_recording(self) -> None:
        """Record what runs from here on."""
        self.recorded = torch.profiler.profile()
        self.recorded.start()

    def stop_recording(self) -> dict[str, tuple[int, float]]:
        """What ran on the device, by name: how often, and for how many microseconds in all."""
        self.recorded.stop()
        on_gpu = torch.cuda.is_available()
        device = torch.profiler.DeviceType.CUDA if on_gpu else torch.profiler.DeviceType.CPU
        ran: dict[str, tuple[int, float]] = {}
        for event in self.recorded.events():
            if event.device_type == device:
                count, microseconds = ran.get(event.name, (0, 0.0))
                more = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                ran[event.name] = count + 1, microseconds + more
        return ran

    def parade_static(self, static: bool) -> None:
        """Switch generators off (rows keep the vectors they have, as static ones would stay) or on again."""
        manager = self.model_runner.parade  # type: ignore[attr-defined]
        manager.__dict__.pop("prepare", None)
        if static:
            prepare = manager.prepare

            def without_instructions(plan: Any, *args: Any, **kwargs: Any) -> Any:
                return prepare(replace(plan, instructions={}), *args, **kwargs)

            manager.prepare = without_instructions

    def allocated_bytes(self) -> int:
        """The most device memory that tensors of this worker have taken together."""
        return torch.cuda.max_memory_allocated()

    def parade_bytes(self) -> dict[str, int]:
        """Device memory of the vector tables and of the adapters' slots."""
        slots = self.model_runner.parade.slots  # type: ignore[attr-defined]
        return {
            "tables": sum(layer.table.nbytes for layer in slots.layers),
            "slots": slots.device_bytes,
        }


class Variant:
    """The engine of a variant. Prompts are never repeated, so nothing comes from a cache."""

    def __init__(self, settings: Settings) -> None:
        from vllm import LLM

        import vllm_parade  # noqa: F401  teaches LLM its keywords

        self.name, self.settings = settings.variant, settings
        folder = Path(settings.folder) / settings.size
        self.shape = make_model(folder, settings.size)
        options: dict[str, Any] = {"worker_extension_cls": "benchmarks.engine.WorkerExtension"}
        if self.name == "parade":
            capacity = max(settings.adapters, settings.slots)
            options |= {"enable_parade": True, "max_parades": settings.slots, "max_cpu_parades": capacity}
        elif self.name == "lora":
            options |= {"enable_lora": True, "max_loras": NUM_LORAS, "max_lora_rank": 8}
        self.adapters = self._adapters(folder)
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

    def prompts(self, batch: int, length: int) -> list[dict[str, list[int]]]:
        """Random prompts that nobody has seen."""
        words = range(len(SPECIAL_TOKENS), SIZES[self.settings.size]["vocab_size"])
        return [{"prompt_token_ids": self._random.choices(words, k=length)} for _ in range(batch)]

    def chosen(self, requests: Sequence[Any], batch: int) -> dict[str, Any]:
        """The keyword that gives each prompt of a batch its adapter, in turn; nothing for the base model."""
        return {self.keyword: [requests[number % len(requests)] for number in range(batch)]} if requests else {}

    def run(self, batch: int, length: int, tokens: int, requests: Sequence[Any] = ()) -> float:
        """Seconds for a batch of fresh prompts, `tokens` tokens each, each prompt with the next adapter."""
        return self.ask(self.prompts(batch, length), tokens, requests)

    def ask(self, prompts: list[dict[str, list[int]]], tokens: int, requests: Sequence[Any] = ()) -> float:
        """Seconds for these prompts, likewise."""
        with self.turn():
            started = time.perf_counter()
            self.outputs(prompts, tokens, requests)
            return time.perf_counter() - started

    def outputs(self, prompts: list[dict[str, list[int]]], tokens: int, requests: Sequence[Any]) -> list[Any]:
        """vLLM's outputs for these prompts, each with the next adapter."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=False, **self.chosen(requests, len(prompts)))
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return outputs

    def step(self, batch: int, length: int, tokens: int, requests: Sequence[Any] = ()) -> float:
        """Seconds of a step in which a batch of fresh prompts decodes, on average, by the clock of the engine core.

        It is what the request waited for its tokens that began last, when all others decoded; they end a few steps
        before it.
        """
        with self.turn():
            outputs = self.outputs(self.prompts(batch, length), tokens, requests)
        last = max((output.metrics for output in outputs), key=lambda times: times.first_token_ts)
        return (last.last_token_ts - last.first_token_ts) / (tokens - 1)

    def beam_search(self, width: int, length: int, tokens: int, requests: Sequence[Any] = ()) -> float:
        """Seconds for one fresh prompt with beam search."""
        from vllm.sampling_params import BeamSearchParams

        prompts, chosen = self.prompts(1, length), self.chosen(requests, 1)
        params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
        with self.turn():
            started = time.perf_counter()
            self.llm.beam_search(prompts, params, **chosen)
            return time.perf_counter() - started

    def set_static(self, static: bool) -> None:
        """Whether rows keep the vectors they have, so that no generator runs."""
        self.llm.collective_rpc("parade_static", args=(static,))

    def recorded(
        self, batch: int, length: int, tokens: int, requests: Sequence[Any] = ()
    ) -> list[dict[str, tuple[int, float]]]:
        """Of each worker what runs on its device while fresh prompts are read and answered: by name how often and how
        many microseconds."""
        self.llm.collective_rpc("start_recording")
        self.run(batch, length, tokens, requests)
        return self.llm.collective_rpc("stop_recording")

    def allocated_mib(self) -> float | None:
        """The most device memory that tensors of the first worker have taken together; None without a GPU."""
        return self.llm.collective_rpc("allocated_bytes")[0] / 2**20 if torch.cuda.is_available() else None

    def parade_mib(self) -> dict[str, float]:
        """Computed device memory of tables and slots on the first worker; empty without PARADE."""
        if self.name != "parade":
            return {}
        return {f"{part}_mib": size / 2**20 for part, size in self.llm.collective_rpc("parade_bytes")[0].items()}


class Turn:
    """A file's lock, so that nobody else who asks for a turn runs meanwhile; without a file there is nobody else."""

    def __init__(self, path: str) -> None:
        self.path, self._taken = path, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait for one's turn; within it, another one is the same."""
        if not self.path or self._taken:
            yield
            return
        with open(self.path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._taken = True
            yield
            self._taken = False
        # Whoever waits is to be next.
        time.sleep(0.01)


def used_mib() -> float | None:
    """Memory used on the whole device, by whichever process; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
