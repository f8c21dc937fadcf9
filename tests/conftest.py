"""Shared fixtures: a real small model, a tiny random model, adapters for both and the oracle."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before vLLM is imported: engine core and worker stay in this process, where tests can inspect them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Set before PyTorch is imported: waiting OpenMP threads sleep. On a busy machine, spinning threads take the cores of
# the threads that they wait for, and an engine is ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The other cores are for the other xdist workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.models import make_tokenizer
from testing.random_models import INNER, STRONG, make_adapter, make_tiny_model
from tests.adapters import VARIANTS
from tests.conversations import MARKERS
from tests.engines import close_shared
from tests.interpreter import INTERPRETED, install
from tests.tasks import write_sst2
from tests.workers import make_scheduler, rank
from tools.base_model import base_model
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape

if TYPE_CHECKING:
    from testing.oracle import Oracle

ROOT = Path(__file__).parent.parent

# Hypothesis' time limit of 0.2 s per example is too short on a busy machine.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

if INTERPRETED:
    install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly too")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return make_scheduler(config, log)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Under Triton's interpreter, skip files without kernel tests before they are imported."""
    if INTERPRETED and collection_path.match("test_*.py") and "mark.triton" not in collection_path.read_text("utf-8"):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that cannot run in this process.

    Kernel tests need a GPU or Triton's interpreter. Under the interpreter nothing else runs, because vLLM then takes
    model runner V2.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: rank(item.nodeid))
    for item in items:
        if item.get_closest_marker("nightly") is not None and not config.getoption("--nightly"):
            item.add_marker(pytest.mark.skip(reason="runs with --nightly"))
        kernels = item.get_closest_marker("triton") is not None
        if kernels and not INTERPRETED and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))
        if INTERPRETED and not kernels:
            item.add_marker(pytest.mark.skip(reason="runs without Triton's interpreter"))


def shape_of(model: str) -> BaseModelShape:
    from transformers import AutoConfig

    return BaseModelShape.from_hf_config(AutoConfig.from_pretrained(model))


@pytest.fixture(scope="session")
def smollm() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    return str(base_model())


@pytest.fixture(scope="session")
def weightless(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same model without its weights; a test that passes with it has loaded none."""
    folder = tmp_path_factory.mktemp("weightless")
    for file in Path(smollm).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="session")
def smollm_shape(smollm: str) -> BaseModelShape:
    return shape_of(smollm)


@pytest.fixture(scope="session")
def oracle(smollm: str) -> "Oracle":
    # Imported here: PEFT takes seconds to load, and xdist's controller process needs no oracle.
    from testing.oracle import Oracle

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


@pytest.fixture(scope="session", autouse=True)
def engines() -> Iterator[None]:
    """Close the shared engine after the last test."""
    yield
    close_shared()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random three-layer LLaMA with a word tokenizer; its heads can be split over two ranks."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder)
    make_tokenizer(folder, 512)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_shape(tiny: str) -> BaseModelShape:
    return shape_of(tiny)


@pytest.fixture(scope="session")
def tiny_oracle(tiny: str) -> "Oracle":
    from testing.oracle import Oracle

    return Oracle(tiny)


@pytest.fixture(scope="session")
def tiny_variants(tmp_path_factory: pytest.TempPathFactory, tiny_shape: BaseModelShape) -> dict[str, ParadeRequest]:
    """Random strong adapters of every kind for the tiny model, by name."""
    folder = tmp_path_factory.mktemp("tiny-variants")
    kinds = {**VARIANTS, "some_layers": {**VARIANTS["some_layers"], "layers_to_transform": (0, 2)}}
    return {
        name: make_adapter(folder / name, tiny_shape, seed, **{"inner": INNER, **kind})
        for seed, (name, kind) in enumerate(kinds.items())
    }


@pytest.fixture(scope="session")
def marked(tmp_path_factory: pytest.TempPathFactory, tiny_shape: BaseModelShape) -> list[ParadeRequest]:
    """Random strong adapters for the tiny model that mark the turns of `tests.conversations`."""
    folder = tmp_path_factory.mktemp("marked")
    kinds: dict[str, dict[str, Any]] = {
        "turns": {},
        # Its vectors depend only on the last token of an instruction.
        "last_turns": {"pooler": "last_token", "strength": STRONG / 5},
        "short_turns": {"instruction_max_tokens": 12},
    }
    return [
        make_adapter(folder / name, tiny_shape, 50 + seed, inner=INNER, **MARKERS, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    ]


@pytest.fixture(scope="session")
def small(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer model with SmolLM2's tokenizer, for tests that train."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(smollm, **sizes, num_key_value_heads=2, head_dim=32, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder)
    (folder / "SOURCE.txt").write_text("model: made up for a test\nweights: random\n")
    return str(folder)


@pytest.fixture(scope="session")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small task in SST-2's format."""
    return write_sst2(tmp_path_factory.mktemp("sst2"))
