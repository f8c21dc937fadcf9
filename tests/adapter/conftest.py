# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_parade.adapter import AdapterConfig, BaseModelShape, adapted_layers, initial_generator, save_adapter
from vllm_parade.adapter.folder import CONFIG_FILE, WEIGHTS_FILE

SHAPE = BaseModelShape(hidden_size=8, num_layers=3, widths={"q": 8, "k": 4, "v": 4, "gate": 16, "up": 16})
CONFIG = AdapterConfig(base_model_name_or_path="tiny", r=4, num_capsules=2)


@dataclass(frozen=True)
class Folder:
    """An adapter folder, with methods that damage it."""

    path: Path

    @property
    def config_file(self):
        return self.path / CONFIG_FILE

    @property
    def weights_file(self):
        return self.path / WEIGHTS_FILE

    def change_config(self, **values):
        self.config_file.write_text(json.dumps({**json.loads(self.config_file.read_text()), **values}))

    def change_tensors(self, changes):
        """None removes a tensor."""
        tensors = {**load_file(self.weights_file), **changes}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, self.weights_file)


def key(layer, name):
    return f"base_model.model.model.layers.{layer}.parade_generator.{name}"


def make_generators(config=CONFIG, shape=SHAPE, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {layer: initial_generator(config, shape, random) for layer in adapted_layers(config, shape)}


@pytest.fixture
def shape():
    return SHAPE


@pytest.fixture
def config():
    return CONFIG


@pytest.fixture
def tensor_key():
    return key


@pytest.fixture
def generators_for():
    return make_generators


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "adapter", CONFIG, make_generators())
    return Folder(tmp_path / "adapter")
