# SPDX-License-Identifier: Apache-2.0
"""Documentation pages: commands run, links resolve, and texts agree with code and results."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import PAGES, ROOT, blocks, commands, read, texts
from tools import picture
from tools.generate import GENERATED, TABLES, generated
from tools.prose import literal
from vllm_parade.frontend import startup

RUN = ("bash", "python", "yaml", "json")
NEEDS = {"gpu", "cluster"}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# A message with fewer fixed characters is skipped, because its pattern would match anything.
LEAST_LETTERS = 20


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_what_it_needs(page: str) -> None:
    for block in blocks(page):
        where = f"{page}: the block that begins with {block.text.splitlines()[0]!r}"
        assert block.language in (*RUN, "text"), where
        if block.language == "text":
            continue
        assert block.mark in ("runs", "needs"), f"{where} has no comment that says what runs it"
        if block.mark == "needs":
            assert set(block.names) <= NEEDS, where
            continue
        for name in block.names:
            file, _, test = name.partition("::")
            source = (ROOT / file).read_text(encoding="utf-8")
            assert not test or (f"def {test}(" in source and page in source), f"{where}: {name} does not read this page"


def test_ci_runs_what_the_pages_say() -> None:
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for page in ("docs/index.md", "CONTRIBUTING.md"):
        for text in texts(page, ".ci/run", "bash"):
            for _, target, *_ in commands(text):
                # install: the targets in .ci/run depend on it.
                assert target == "install" or f"make {target}\n" in ci


def test_make_knows_its_targets_and_variables() -> None:
    name = "tests/test_docs.py::test_make_knows_its_targets_and_variables"
    (text,) = texts("CONTRIBUTING.md", name, "bash")
    for _, target, *variables in commands(text):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
        for variable in variables:
            assert f"$({variable.partition('=')[0]})" in MAKEFILE
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)", read(page)):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{page}: make {target}"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, *(f"examples/adapters/{name}/README.md" for name in ("sst2", "e2e"))])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_files_exist_that_are_named(page: str) -> None:
    for file in re.findall(
        r"\b(?:examples|tests|tools|patches|vllm_parade|benchmarks)/[\w/.-]+\.(?:py|sh|md|yaml)\b", read(page)
    ):
        assert (ROOT / file).is_file(), f"{page}: {file}"


@pytest.mark.parametrize("page", [page for page in PAGES if GENERATED.search(read(page))])
def test_generated_tables_are_those_of_code_and_results(page: str) -> None:
    assert generated(read(page)) == read(page), f"run python -m tools.generate and look at what it changes in {page}"


def test_every_table_stands_on_a_page() -> None:
    used = {name for page in PAGES for _, name, _ in GENERATED.findall(read(page))}
    assert used == TABLES.keys()


def test_the_picture_is_what_its_script_draws() -> None:
    assert picture.FILE.read_text(encoding="utf-8") == picture.draw()


def test_every_refusal_is_described() -> None:
    name = r"--[a-z-]+|VLLM_[A-Z0-9_]+"
    section = read("docs/serving.md").split("\n## What the server refuses\n")[1].split("\n## ")[0]
    described = re.findall(rf"`({name})", "\n".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE)))
    assert set(described) == set(re.findall(rf'"({name})', inspect.getsource(startup._unsupported)))


def test_the_tree_is_the_tree() -> None:
    (tree,) = [block.text for block in blocks("docs/architecture.md") if block.language == "text"]
    folder = ROOT
    for indent, name in re.findall(r"^( *)([a-z_]+)/  ", tree, re.MULTILINE):
        path = folder / name if indent else ROOT / name
        assert path.is_dir(), path
        folder = folder if indent else path
    packages = {file.parent.name for file in (ROOT / "vllm_parade").glob("*/__init__.py")}
    assert set(re.findall(r"^  ([a-z_]+)/", tree, re.MULTILINE)) == packages


def messages() -> Iterator[re.Pattern[str]]:
    """A pattern for every string of the package; a placeholder matches any text."""
    for file in (ROOT / "vllm_parade").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Constant, ast.JoinedStr)):
                continue
            parts = literal(node).split("{...}")
            if sum(map(len, parts)) >= LEAST_LETTERS:
                yield re.compile(".*" + ".*".join(map(re.escape, parts)), re.DOTALL)


def test_messages_on_the_page_are_the_codes() -> None:
    known = list(messages())
    text = read("docs/troubleshooting.md").split("\n## Messages of other programs\n")[0]
    told = re.findall(r"^\| `([^`]+)`(?: \([^)]*\))? \|", text, re.MULTILINE)
    assert len(told) > 40
    for message in told:
        assert any(pattern.fullmatch(message) for pattern in known), f"the code does not say: {message}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for file in ("index.html", "serving/index.html", "patches/index.html", "examples/ray/serve.yaml"):
        assert (tmp_path / file).is_file(), file
