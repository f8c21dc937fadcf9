"""Real vLLM engines inside the test process: started, used, taken down."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 30,
    "disable_log_stats": False,
}


def dict_of(value: Any) -> Any:
    """`vars`, for objects that answer to any name: llvmlite's library is one, and has no `__dict__` in truth.

    vLLM 0.32 looks at all modules' values when a CPU engine starts, and trips over it once numba is loaded, as
    speculative decoding does.
    """
    found = vars(value)
    return found if isinstance(found, (dict, MappingProxyType)) else {}


@contextmanager
def engine(model: str, **options: Any) -> Iterator[Any]:
    """An `LLM`; its engine core and worker live in this process, so that tests can look at them."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.triton_utils import dispatcher

    import vllm_parade  # noqa: F401  teaches LLM its keywords

    vars(dispatcher)["vars"] = dict_of
    if options.get("enable_parade"):
        # Test adapters have ranks up to 24.
        options = {"max_parade_rank": 32, **options}
    llm = LLM(model, **{**DEFAULTS, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    """The PARADE manager of the worker in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.parade


def prompts(lengths: list[int], seed: int = 0, vocab: int = 40_000) -> list[dict[str, list[int]]]:
    """Random prompts of these lengths, as token ids."""
    random = torch.Generator().manual_seed(seed)
    low = min(100, vocab // 2)
    return [{"prompt_token_ids": torch.randint(low, vocab, (n,), generator=random).tolist()} for n in lengths]


def greedy(max_tokens: int = 8, *, logprobs: int = 1, **options: Any) -> Any:
    """Sampling parameters of a greedy answer of exactly this length, with log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs, **options)


def record_steps(llm: Any, steps: list[dict[str, int]]) -> None:
    """Note the scheduled tokens of every step, by the number of the request."""
    mine = scheduler(llm)
    original = mine.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        steps.append({name.split("-")[0]: tokens for name, tokens in output.num_scheduled_tokens.items()})
        return output

    mine.schedule = schedule
