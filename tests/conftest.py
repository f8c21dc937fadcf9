"""What the tests share: the real small model, a tiny random one, adapters for them and the oracle."""

import os
from pathlib import Path

# Before vLLM is imported: engine core and worker stay in this process, where tests can look at them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from testing.oracle import Oracle
from testing.random_models import make_adapter, make_tiny_model
from tests.adapters import VARIANTS
from tests.interpreter import INTERPRETED, install
from tests.tasks import write_sst2
from tools.base_model import base_model
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape

ROOT = Path(__file__).parent.parent

if INTERPRETED:
    install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Kernels need a GPU or the interpreter, whose process runs nothing else: vLLM there is another one (runner V2)."""
    for item in items:
        if item.get_closest_marker("nightly") is not None and not config.getoption("--nightly"):
            item.add_marker(pytest.mark.skip(reason="runs with --nightly"))
        kernels = item.get_closest_marker("triton") is not None
        if kernels and not INTERPRETED and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))
        if INTERPRETED and not kernels:
            item.add_marker(pytest.mark.skip(reason="runs without Triton's interpreter"))


@pytest.fixture(scope="session")
def smollm() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    return str(base_model())


@pytest.fixture(scope="session")
def smollm_shape(smollm: str) -> BaseModelShape:
    from transformers import AutoConfig

    return BaseModelShape.from_hf_config(AutoConfig.from_pretrained(smollm))


@pytest.fixture(scope="session")
def oracle(smollm: str) -> Oracle:
    return Oracle(smollm)


@pytest.fixture(scope="session")
def trained() -> dict[str, ParadeRequest]:
    """The two adapters that the project ships, by name."""
    return {name: ParadeRequest(name, str(ROOT / "examples/adapters" / name)) for name in ("sst2", "e2e")}


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory, smollm_shape: BaseModelShape) -> dict[str, ParadeRequest]:
    """Random strong adapters of every kind for SmolLM2, by name."""
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: make_adapter(folder / name, smollm_shape, seed, **config)
        for seed, (name, config) in enumerate(VARIANTS.items())
    }


@pytest.fixture(scope="session", params=[2, 1], ids=["kv2", "kv1"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random LLaMA of three layers whose heads can be split over two ranks; without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / f"kv{request.param}"
    make_tiny_model(folder, kv_heads=request.param)
    return str(folder)


@pytest.fixture(scope="session")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small task in SST-2's format."""
    return write_sst2(tmp_path_factory.mktemp("sst2"))
