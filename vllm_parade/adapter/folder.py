# SPDX-License-Identifier: Apache-2.0
"""The files of an adapter's folder: read without leaving it, written without a half-written one ever being seen."""

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_parade.adapter.config import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where PEFT and its predecessors keep pickled weights; unpickling runs whatever code the file asks for.
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


def read_file(folder: Path, name: str) -> bytes:
    """The content of one of an adapter's files.

    Raises:
        AdapterError: no such folder or file, not readable, or a link leads out of the folder.
    """
    try:
        return _resolve(folder, name).read_bytes()
    # RuntimeError is a loop of links.
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
        raise AdapterError(f"{file}: no regular file; expected one")
    return target


def _pickle_hint(folder: Path, name: str) -> str:
    pickled = [other for other in PICKLE_FILES if name == WEIGHTS_FILE and (folder / other).exists()]
    if not pickled:
        return f"; expected {CONFIG_FILE} and {WEIGHTS_FILE} in the folder"
    return f"; {pickled[0]} is not read, since only safetensors is (no pickle): save the adapter as {WEIGHTS_FILE}"


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of an adapter, each in one stroke and only once all of them are on the disk.

    Raises:
        OSError: as the file system says; files written before are then as they were.
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
