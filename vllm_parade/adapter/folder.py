# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the files of an adapter's folder. Refuses links out of the folder, and replaces files atomically."""

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_parade.adapter.config import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Pickled weights of PEFT and older libraries. They are never read, because unpickling can run arbitrary code.
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


def read_file(folder: Path, name: str) -> bytes:
    """Read one of an adapter's files.

    Raises:
        AdapterError: the folder or file is missing or unreadable, or the file is a link out of the folder.
    """
    try:
        return _resolve(folder, name).read_bytes()
    # A loop of links raises RuntimeError.
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"{folder / name}: cannot be read: {error}") from error


def _resolve(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise AdapterError(f"{folder}: {problem}; expected a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    file = folder / name
    target = file.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise AdapterError(
            f"{file}: a link to {target}, outside the adapter's folder; expected a file inside it: copy the file there"
        )
    if not target.exists():
        raise AdapterError(f"{file}: no such file{_pickle_hint(folder, name)}")
    if not target.is_file():
        raise AdapterError(f"{file}: not a regular file; expected one")
    return target


def _pickle_hint(folder: Path, name: str) -> str:
    pickled = [other for other in PICKLE_FILES if name == WEIGHTS_FILE and (folder / other).exists()]
    if not pickled:
        return f"; expected {CONFIG_FILE} and {WEIGHTS_FILE} in the folder"
    return f"; {pickled[0]} is not read: only safetensors files are (no pickle); save the adapter as {WEIGHTS_FILE}"


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of an adapter. Each file is replaced atomically, after all new files are on the disk.

    Raises:
        OSError: a file cannot be written or replaced. If writing fails, existing files stay unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            drafts[name].write_bytes(content)
        for name, draft in drafts.items():
            draft.replace(folder / name)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
