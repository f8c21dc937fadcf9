# SPDX-License-Identifier: Apache-2.0
"""The package's public names, and the modules that importing it loads."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_parade

PACKAGE = Path(vllm_parade.__file__).parent
ROOMS = {"frontend", "scheduler", "worker"}


def test_all_is_short_and_sorted():
    assert vllm_parade.__all__ == ["ParadeConfig", "ParadeRequest", "__version__"]
    assert vllm_parade.__all__ == sorted(vllm_parade.__all__)
    for name in vllm_parade.__all__:
        assert hasattr(vllm_parade, name)


WITH_ALL = [path for path in sorted(PACKAGE.rglob("*.py")) if "__all__" in path.read_text()]


@pytest.mark.parametrize("path", WITH_ALL, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_all_names_what_the_module_has(path):
    tree = ast.parse(path.read_text())
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    defined = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.asname or alias.name for alias in node.names]
            if isinstance(node, (ast.ImportFrom, ast.Import))
            else [node.name]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [target.id for target in _targets(node) if isinstance(target, ast.Name)]
        )
    }
    assert len(set(names)) == len(names)
    assert set(names) <= defined


def _targets(node: ast.AST) -> list[ast.expr]:
    return [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])


LIGHT = ("vllm_parade", "vllm_parade.adapter", "vllm_parade.ops.reference", "vllm_parade.tuner", "vllm_parade.train")


@pytest.mark.parametrize("module", LIGHT)
def test_training_code_loads_neither_vllm_nor_triton(module):
    """PyTorch, PEFT and Transformers may load Triton; only modules loaded after them count."""
    library = "torch, peft, transformers.trainer" if module.endswith(("tuner", "train")) else "torch"
    script = (
        f"import sys, pkgutil, importlib, {library}\n"
        "before = set(sys.modules)\n"
        f"package = importlib.import_module({module!r})\n"
        f"if {module!r} in ('vllm_parade.tuner', 'vllm_parade.train', 'vllm_parade.adapter'):\n"
        "    for info in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(info.name)\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "vllm_parade" in loaded
    assert not loaded & {"vllm", "triton"}


HEAVY = {"numpy", "peft", "ray", "torch", "transformers", "vllm", "vllm_parade.adapter", "vllm_parade.cluster.routing"}


@pytest.mark.parametrize("statement", ["import vllm_parade", "from vllm_parade.cluster import lifeline"])
def test_the_front_door_loads_nothing_heavy(statement):
    """Every vLLM process imports the plugin, as does every tool that only needs the package's version."""
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "vllm_parade" in loaded
    heavy = loaded & HEAVY
    assert not heavy


def test_the_routing_rule_is_public():
    from vllm_parade import cluster
    from vllm_parade.cluster import AffinityRule, routing

    assert AffinityRule is routing.AffinityRule
    with pytest.raises(AttributeError, match="module 'vllm_parade.cluster' has no attribute 'Rule'"):
        cluster.Rule  # noqa: B018


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Distributions whose name differs from the module's.
DISTRIBUTIONS = {"rouge_score": "rouge-score", "yaml": "pyyaml"}
# Not in the extra: few users need them, and an error message says how to install them.
OPTIONAL = {"datasets", "vllm"}


def test_the_extra_train_brings_all_that_its_commands_import():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared}
    files = [PACKAGE / "evaluate.py", PACKAGE / "inspect.py"]
    files += [path for room in ("train", "tuner", "adapter") for path in (PACKAGE / room).glob("*.py")]
    imported = {name.split(".")[0] for path in files for name in imported_modules(path)}
    foreign = imported - set(sys.stdlib_module_names) - {"vllm_parade"} - OPTIONAL
    assert {"matplotlib", "peft", "yaml"} <= foreign
    missing = {name for name in foreign if DISTRIBUTIONS.get(name, name) not in names}
    assert not missing


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_of_different_processes_do_not_import_each_other(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for path in files:
        rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("vllm_parade.")}
        assert not rooms & (ROOMS - {room}), f"{path} imports another room"


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("layers", {"adapter", "layers", "ops", "request"}),
        ("ops", {"adapter", "ops"}),
        ("adapter", {"adapter", "ops"}),
        ("tuner", {"adapter", "ops", "tuner"}),
    ],
)
def test_lower_rooms_know_nothing_of_higher_ones(room, allowed):
    for path in (PACKAGE / room).glob("*.py"):
        rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("vllm_parade.")}
        assert rooms <= allowed, f"{path} imports {sorted(rooms - allowed)}"
