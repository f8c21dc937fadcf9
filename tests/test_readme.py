# SPDX-License-Identifier: Apache-2.0
"""README is short and its claims hold. test_docs checks its generated tables."""

import re
import subprocess

import pytest

from tests.documents import ROOT, read, texts
from tools import figures

README = read("README.md")
HERE = "tests/test_readme.py"


def test_it_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1000


def test_the_speed_table_is_of_the_one_run_that_it_names() -> None:
    section = README.split("\n## Speed\n")[1].split("\n## ")[0]
    assert re.findall(r"\((benchmarks/[^)]+)\)", section) == [f"{figures.RESULTS}/{figures.SPEED_FILE}"]
    content = figures.content(figures.RESULTS, figures.SPEED_FILE)
    assert {"base", "parade", "lora"} <= {one["variant"] for one in content["results"] if one["workload"] == "decode"}
    machine = content["machine"]
    assert machine["card"].split()[1] in section
    assert f"vLLM {machine['vllm']}" in section


def test_ci_runs_the_second_command() -> None:
    (text,) = texts("README.md", ".ci/run", "bash")
    assert "make test" in text
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.nightly
@pytest.mark.engine
def test_make_demo() -> None:
    (text,) = texts("README.md", f"{HERE}::test_make_demo", "bash")
    assert text.startswith("make demo ")
    # The environment is already installed; --assume-old keeps make from installing it again.
    stamps = [word for device in ("cpu", "cuda") for word in ("--assume-old", f".venv/.installed-{device}")]
    done = subprocess.run(["make", *stamps, "demo"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "14 answers" in done.stdout
    assert "positive" in done.stdout
