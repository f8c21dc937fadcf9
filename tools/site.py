# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs that adds pages outside docs/, and files that pages link to, to the site.

Links in pages are those of the repository, so that they work there too. On the site, docs/ is the root, and all other
files keep their path in the repository. docs/index.md replaces README.md.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
OUTSIDE = ("CONTRIBUTING.md", "patches/README.md", "benchmarks/study/TABLES.md")
HOME = {"README.md": "docs/index.md"}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def repository_path(site_path: str) -> str:
    """Path in the repository of a page of the site."""
    return DOCS + site_path if (ROOT / DOCS / site_path).is_file() else site_path


def site_path(path: str) -> str:
    """Path on the site of a file of the repository."""
    return HOME.get(path, path).removeprefix(DOCS)


def targets(path: str) -> Iterator[str]:
    """Files of the repository that a page links to."""
    for _, target, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs with the files of docs/. Adds the pages and files outside docs/."""
    pages = [*OUTSIDE, *(DOCS + file.src_uri for file in files.documentation_pages())]
    known = {repository_path(file.src_uri) for file in files}
    for path in dict.fromkeys([*OUTSIDE, *(target for page in pages for target in targets(page))]):
        if path not in known and path not in HOME and (ROOT / path).is_file():
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page. Changes its links to the paths on the site."""
    path = repository_path(page.file.src_uri)
    here, there = posixpath.dirname(path), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(here, link[2])))
        return f"{link[1]}{posixpath.relpath(target, there or '.')}{link[3]}"

    return LINK.sub(moved, markdown)
