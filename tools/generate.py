# SPDX-License-Identifier: Apache-2.0
"""Write the generated tables into the pages.

    python -m tools.generate            # after a change of flags, metrics, arguments or results
    python -m tools.generate --check    # exit code 1 if a page differs from code or results; writes nothing

In a page, a generated table is between two comments: `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from tools import figures, history, tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
GENERATED = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    "speed": figures.speed,
    "adapters": figures.adapters,
    "performance": figures.performance,
    "runs": figures.runs,
    "exactness": figures.exactness,
    "history": history.history,
    "routing": figures.routing,
    "study": figures.study,
    "flags": tables.flags,
    "metrics": tables.metrics,
    "ray-arguments": tables.ray_arguments,
    "ray-metrics": tables.ray_metrics,
    "adapter-keys": tables.adapter_keys,
    "adapter-tensors": tables.adapter_tensors,
    "trainer-flags": tables.trainer_flags,
    "trainer-defaults": tables.trainer_defaults,
}


def generated(text: str) -> str:
    """A page's text with regenerated tables.

    Raises:
        KeyError: a table's name is not in `TABLES`.
    """
    return GENERATED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only print which pages differ")
    check = parser.parse_args().check
    different = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = generated(text)
        if new == text:
            continue
        different += 1
        print(f"{page}: {'differs; run python -m tools.generate' if check else 'written'}")
        if not check:
            (ROOT / page).write_text(new, encoding="utf-8")
    return int(check and different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
