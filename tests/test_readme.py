"""What the README promises exists."""

import inspect
import re
from pathlib import Path

import pytest

from vllm_parade.config import ServingConfig, flag_name
from vllm_parade.frontend import startup
from vllm_parade.frontend.metrics import DOCUMENTATION
from vllm_parade.stats import PREFIX, RowCounts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFUSED = "What is refused, and why"


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_flag_is_described() -> None:
    described = re.findall(r"^\| `(--[a-z-]+)` \|", section("Serving online"), re.MULTILINE)
    assert described == [flag_name(name) for name in ServingConfig.__dataclass_fields__]


def test_every_metric_is_described() -> None:
    described = re.findall(r"^\| `vllm:([a-z_]+)_total` \|", section("Serving online"), re.MULTILINE)
    counted = [PREFIX + name for name in RowCounts.__dataclass_fields__]
    assert described == counted == [PREFIX + name for name in DOCUMENTATION]


def test_every_refusal_is_described() -> None:
    name = r"--[a-z-]+|VLLM_[A-Z0-9_]+"
    described = re.findall(rf"`({name})", "\n".join(re.findall(r"^\| (.*?) \|", section(REFUSED), re.MULTILINE)))
    assert set(described) == set(re.findall(rf'"({name})', inspect.getsource(startup._unsupported)))


def test_every_argument_of_the_application_is_described() -> None:
    app = pytest.importorskip("vllm_parade.cluster.app")
    table = section("Ray").split("| argument | meaning |")[1].split("\n\n")[0]
    described = re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert described == list(app.Arguments.model_fields)


def test_the_tree_is_the_tree() -> None:
    folder = ROOT
    for indent, name in re.findall(r"^( *)([a-z_]+)/  ", section("Tree"), re.MULTILINE):
        path = folder / name if indent else ROOT / name
        assert path.is_dir(), path
        folder = folder if indent else path
    listed = re.findall(r"^  ([a-z_]+)/", section("Tree"), re.MULTILINE)
    packages = {file.parent.name for file in (ROOT / "vllm_parade").glob("*/__init__.py")}
    assert set(listed) == packages


def test_links_and_commands_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for file in re.findall(r"\b(?:benchmarks|examples|tests|tools)/[\w/]+\.(?:py|sh)", README):
        assert (ROOT / file).is_file(), file
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b", README):
        assert f"\n{target}:" in makefile, target
