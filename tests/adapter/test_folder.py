# SPDX-License-Identifier: Apache-2.0
import os
import shutil

import pytest

from vllm_parade.adapter import AdapterError, load_adapter


def refuses(folder, *parts):
    with pytest.raises(AdapterError) as refusal:
        load_adapter(folder.path)
    for part in parts:
        assert str(part) in str(refusal.value)


def test_missing(tmp_path):
    with pytest.raises(AdapterError, match="no such folder; expected a folder that holds adapter_config.json"):
        load_adapter(tmp_path / "absent")


@pytest.mark.parametrize("path", ["\0", "a" * 5000])
def test_path_that_cannot_be(path):
    with pytest.raises(AdapterError, match=r"no such folder|cannot be read"):
        load_adapter(path)


def test_a_file(folder):
    with pytest.raises(AdapterError, match="adapter_config.json: is a file; expected a folder"):
        load_adapter(folder.config_file)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_file_missing(folder, name):
    (folder.path / name).unlink()
    refuses(folder, f"{folder.path / name}: no such file; expected adapter_config.json and")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_folder_or_pipe_in_a_files_place(folder, name):
    file = folder.path / name
    file.unlink()
    file.mkdir()
    refuses(folder, f"{file}: not a regular file; expected one")
    file.rmdir()
    os.mkfifo(file)
    refuses(folder, f"{file}: not a regular file; expected one")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_link_that_leaves_the_folder(folder, tmp_path, name, exists, relative):
    file, outside = folder.path / name, tmp_path / "outside"
    file.rename(outside)
    if not exists:
        outside.unlink()
    file.symlink_to("../outside" if relative else outside)
    refuses(folder, f"{file}: a link to {outside}, outside the adapter's folder", "copy the file there")


def test_link_to_a_sibling_with_the_same_beginning(folder):
    other = folder.path.with_name(folder.path.name + "-other")
    shutil.copytree(folder.path, other)
    folder.weights_file.unlink()
    folder.weights_file.symlink_to(other / folder.weights_file.name)
    refuses(folder, f"{folder.weights_file}: a link to")


def test_link_loop(folder):
    folder.weights_file.unlink()
    folder.weights_file.symlink_to(folder.weights_file.name)
    refuses(folder, folder.weights_file)


def test_unreadable_file(folder, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    refuses(folder, f"{folder.config_file}: cannot be read", "Permission denied")


def test_link_within_the_folder_and_link_to_the_folder_are_fine(folder, tmp_path):
    before = load_adapter(folder.path).content_hash
    folder.weights_file.rename(folder.path / "weights")
    folder.weights_file.symlink_to("weights")
    (tmp_path / "link").symlink_to(folder.path)
    assert load_adapter(tmp_path / "link").content_hash == before
