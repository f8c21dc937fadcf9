"""Start, use and stop real vLLM engines inside the test process."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch

from vllm_parade import ParadeRequest

Asked = tuple[list[dict[str, list[int]]], list[ParadeRequest | None]]
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 28,
    "disable_log_stats": False,
}


def dict_of(value: Any) -> Any:
    """`vars`, or an empty dict if the object's `__dict__` is not a mapping.

    When a CPU engine starts, vLLM 0.32 inspects the values of all modules. llvmlite's library object returns something
    for any attribute, `__dict__` included, and breaks that once numba is loaded (speculative decoding loads it).
    """
    found = vars(value)
    return found if isinstance(found, (dict, MappingProxyType)) else {}


class _Shared:
    """The engine that several tests share, and its options. A process holds one at a time."""

    made_of: Any = None
    closing = ExitStack()
    llm: Any = None


def shared(model: str, **options: Any) -> Any:
    """The engine with these options. Consecutive tests share it, because an engine start is slow."""
    if _Shared.made_of != (model, options):
        close_shared()
        _Shared.llm = _Shared.closing.enter_context(engine(model, **options))
        _Shared.made_of = (model, options)
    return _Shared.llm


def close_shared() -> None:
    """Stop the shared engine, if there is one."""
    _Shared.closing.close()
    _Shared.made_of = _Shared.llm = None


@cache
def prepare() -> None:
    """Do once per process what vLLM would repeat for every engine."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher

    import vllm_parade  # noqa: F401  adds PARADE's keywords to LLM

    vars(dispatcher)["vars"] = dict_of
    # This method searches all modules; after the first call there is nothing left to replace.
    platform = type(current_platform)
    platform.register_triton_kernel_overrides = staticmethod(cache(current_platform.register_triton_kernel_overrides))
    # Modules and classes are never freed, so later collections can skip them.
    gc.collect()
    gc.freeze()
    # At exit, nanobind would report frozen objects as leaks.
    atexit.register(gc.unfreeze)


@contextmanager
def no_collections() -> Iterator[None]:
    """Disable garbage collection: from start to end, vLLM collects nine times, which takes longer than all else."""
    with patch.multiple(gc, collect=lambda generation=2: 0, freeze=lambda: None, unfreeze=lambda: None):
        yield


@contextmanager
def engine(model: str, **options: Any) -> Iterator[Any]:
    """An `LLM` whose engine core and worker run in this process, so that tests can inspect them."""
    close_shared()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    prepare()
    if options.get("enable_parade"):
        # Test adapters have ranks up to 24.
        options = {"max_parade_rank": 32, **options}
    with no_collections():
        llm = LLM(model, **{**DEFAULTS, **options})
    try:
        yield llm
    finally:
        with no_collections():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        with no_collections():
            cleanup_dist_env_and_memory()


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    """The PARADE manager of the worker in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.parade


def tiny_engine(model: str, **options: Any) -> Any:
    """An `engine` with PARADE and without a tokenizer."""
    return engine(model, enable_parade=True, skip_tokenizer_init=True, **options)


def prompts(lengths: list[int], seed: int = 0, vocab: int = 40_000) -> list[dict[str, list[int]]]:
    """Random prompts of these lengths, as token ids."""
    random = torch.Generator().manual_seed(seed)
    low = min(100, vocab // 2)
    return [{"prompt_token_ids": torch.randint(low, vocab, (n,), generator=random).tolist()} for n in lengths]


def greedy(max_tokens: int = 8, *, logprobs: int = 1, **options: Any) -> Any:
    """Sampling parameters for a greedy answer of exactly `max_tokens` tokens, with log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs, **options)


def tiny_prompts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Random prompts for a model of `make_tiny_model`."""
    return prompts(lengths, seed, vocab=512)


def tiny_greedy(max_tokens: int = 8, **options: Any) -> Any:
    """`greedy` for a model without a tokenizer."""
    return greedy(max_tokens, detokenize=False, **options)


def answered_twice(
    llm: Any, asked: Asked, params: Any, *, block_size: int, cached: bool = True
) -> tuple[list[Any], list[ParadeRequest | None]]:
    """Answers with empty caches, then with all vectors and blocks cached; and the adapter of each answer."""
    assert llm.reset_prefix_cache()
    rows, outputs = scheduler(llm).rows, []
    for again in (False, True):
        before = rows.misses
        outputs += llm.generate(asked[0], params, parade_request=asked[1], use_tqdm=False)
        read = len([request for request in asked[1] if request is not None])
        assert rows.misses - before == (0 if again else read)
        assert len(rows) == 0
    found = [output.num_cached_tokens >= block_size for output in outputs]
    assert found == [False] * len(asked[0]) + [cached] * len(asked[0])
    return outputs, asked[1] * 2


def record_steps(llm: Any, steps: list[dict[str, int]]) -> None:
    """Append each step's scheduled tokens to `steps`, by request number."""
    mine = scheduler(llm)
    original = mine.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        steps.append({name.split("-")[0]: tokens for name, tokens in output.num_scheduled_tokens.items()})
        return output

    mine.schedule = schedule
