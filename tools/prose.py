# SPDX-License-Identifier: Apache-2.0
"""Sample sentences from the project's prose at a git revision, so that a reader can count the unclear ones.

    python -m tools.prose --revision main --seed 0 --count 50

The same revision, seed and count give the same sentences. README.md, the other pages, docstrings, and messages
(exceptions, log lines, help texts) give a quarter each.
"""

import argparse
import ast
import io
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("vllm_parade", "examples", "benchmarks")
PAGES = ("CONTRIBUTING.md", "patches/README.md")
LOG_METHODS = ("debug", "info", "warning", "error", "exception")
LEAST_WORDS = 5
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(*\[])")


def files(revision: str) -> dict[str, str]:
    """Text of all Markdown and Python files of a revision, by path."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith((".md", ".py")) else None
            if file is not None:
                found[member.name] = file.read().decode()
    return found


def sentences(text: str) -> Iterator[str]:
    """The sentences of a paragraph that have at least `LEAST_WORDS` words."""
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        if len(sentence.split()) >= LEAST_WORDS:
            yield sentence


def markdown_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items of a page, without code blocks, comments, tables and headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        lines = [line for line in paragraph.splitlines() if not line.lstrip().startswith(("|", "#", "!["))]
        yield re.sub(r"^\s*(?:[-*]|\d+\.) ", "", "\n".join(lines))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, its classes, functions and fields, without indented commands."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not body:
            continue
        for statement in body if isinstance(node, ast.ClassDef) else body[:1]:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield from re.split(r"\n\s*\n", re.sub(r"^ {4,}python .*$", "", text, flags=re.MULTILINE))


def messages(tree: ast.Module) -> Iterator[str]:
    """Texts of raised exceptions, log lines and help texts, with `{...}` for inserted values."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(args=[first, *_])):
                yield literal(first)
            case ast.Call(func=ast.Attribute(attr=name), args=[first, *_]) if name in LOG_METHODS:
                yield literal(first)
            case ast.keyword(arg="help", value=value):
                yield literal(value)


def literal(node: ast.expr) -> str:
    """The text of a string literal or f-string; empty for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(literal(value) if isinstance(value, ast.Constant) else "{...}" for value in values)
        case ast.BinOp(left=left, right=right):
            return literal(left) + literal(right)
    return ""


def by_kind(contents: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """(path, sentence) pairs of each kind of prose, in the order of the paths."""
    kinds: dict[str, list[tuple[str, str]]] = {"README": [], "docs": [], "docstring": [], "message": []}
    for path, text in sorted(contents.items()):
        first = PurePosixPath(path).parts[0]
        if path == "README.md" or first == "docs" or path in PAGES:
            paragraphs = {"README" if path == "README.md" else "docs": list(markdown_paragraphs(text))}
        elif path.endswith(".py") and first in CODE_FOLDERS:
            tree = ast.parse(text)
            paragraphs = {"docstring": list(docstrings(tree)), "message": list(messages(tree))}
        else:
            continue
        for kind, parts in paragraphs.items():
            kinds[kind] += [(path, sentence) for part in parts for sentence in sentences(part)]
    return kinds


def draw(revision: str, seed: int, count: int) -> list[tuple[str, str, str]]:
    """(kind, path, sentence) of `count` sentences, as evenly over the kinds as possible."""
    kinds = by_kind(files(revision))
    drawn = []
    for number, (kind, found) in enumerate(kinds.items()):
        share = count // len(kinds) + (number < count % len(kinds))
        chosen = random.Random(f"{seed} {kind}").sample(found, min(share, len(found)))
        drawn += [(kind, path, sentence) for path, sentence in chosen]
    return drawn


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default="HEAD", help="git revision (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=50, help="default: %(default)s")
    args = parser.parse_args()
    for number, (kind, path, sentence) in enumerate(draw(args.revision, args.seed, args.count), 1):
        print(f"{number:3} {kind}, {path}\n    {sentence}\n")


if __name__ == "__main__":
    main()
