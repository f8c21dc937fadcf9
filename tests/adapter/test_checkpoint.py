# SPDX-License-Identifier: Apache-2.0
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vllm_parade.adapter
from vllm_parade.adapter import AdapterConfig, AdapterError, load_adapter, load_config, parameter_count, save_adapter

# Each example rewrites the folder, so examples can share the fixture.
shares_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60
)


def assert_same(loaded, generators):
    assert loaded.keys() == generators.keys()
    for layer, weights in generators.items():
        stored = loaded[layer].named_tensors()
        assert stored.keys() == weights.named_tensors().keys()
        for name, tensor in weights.named_tensors().items():
            assert stored[name].dtype == tensor.dtype
            assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooler": "dynamic_routing", "activation": "silu"},
        {"pooler": "last_token", "r": 5},
        {"sites": ("q", "k", "v", "gate", "up"), "layers_to_transform": (0, 2)},
    ],
)
def test_round_trip(tmp_path, shape, generators_for, settings, dtype):
    config = AdapterConfig(**{"r": 4, "num_capsules": 2, **settings})
    generators = {layer: weights.to("cpu", dtype) for layer, weights in generators_for(config).items()}
    save_adapter(tmp_path / "a" / "b", config, generators)
    for known in (shape, None):
        adapter = load_adapter(str(tmp_path / "a" / "b"), known)
        assert adapter.config == config
        assert adapter.path == tmp_path / "a" / "b"
        assert_same(adapter.generators, generators)
        assert adapter.num_parameters == parameter_count(config, shape)


def test_layout_is_pefts(folder, tensor_key):
    assert sorted(os.listdir(folder.path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(folder.config_file.read_text())["peft_type"] == "PARADE"
    with safe_open(folder.weights_file, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert tensor_key(2, "pooler.weight") in file.keys()  # noqa: SIM118 (no iterator)


def test_other_architectures_keep_their_layers_elsewhere(tmp_path, config, generators_for, shape, folder):
    save_adapter(tmp_path / "gpt2", config, generators_for(), layers_path="transformer.h")
    assert any("model.transformer.h.0." in name for name in load_file(tmp_path / "gpt2" / "adapter_model.safetensors"))
    adapter = load_adapter(tmp_path / "gpt2", shape)
    assert_same(adapter.generators, generators_for())
    assert adapter.content_hash == load_adapter(folder.path).content_hash


def test_saving_takes_parameters_views_and_shared_tensors(tmp_path, config, generators_for):
    generators = generators_for()
    shared = torch.nn.Parameter(torch.arange(32.0).reshape(8, 4)).t()
    generators = {layer: replace(weights, down=shared) for layer, weights in generators.items()}
    save_adapter(tmp_path / "a", config, generators)
    assert torch.equal(load_adapter(tmp_path / "a").generators[2].down, shared)


def test_saving_replaces_and_leaves_no_drafts(folder, config, generators_for):
    generators = generators_for(seed=1)
    save_adapter(folder.path, config, generators)
    assert_same(load_adapter(folder.path).generators, generators)
    assert len(os.listdir(folder.path)) == 2


def test_interrupted_saving_keeps_the_adapter(folder, config, generators_for, monkeypatch):
    before = load_adapter(folder.path).content_hash

    def full_disk(self, content):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(folder.path, config, generators_for(seed=1))
    assert load_adapter(folder.path).content_hash == before
    assert len(os.listdir(folder.path)) == 2


class TestContentHash:
    @pytest.fixture
    def before(self, folder):
        return load_adapter(folder.path).content_hash

    def test_is_hexadecimal_sha256(self, before):
        assert re.fullmatch("[0-9a-f]{64}", before)

    def test_ignores_the_folders_name(self, folder, before, tmp_path, shape):
        shutil.copytree(folder.path, tmp_path / "copy")
        assert load_adapter(tmp_path / "copy", shape).content_hash == before

    def test_ignores_the_order_of_tensors_and_keys(self, folder, before):
        folder.weights_file.write_bytes(folder.weights_file.read_bytes())
        save_file(dict(reversed(load_file(folder.weights_file).items())), folder.weights_file, {"written": "by hand"})
        values = json.loads(folder.config_file.read_text())
        folder.config_file.write_text(json.dumps(dict(reversed(values.items()))))
        assert load_adapter(folder.path).content_hash == before

    @pytest.mark.parametrize(
        "change",
        [
            {"base_model_name_or_path": "other"},
            {"inference_mode": False},
            {"task_type": "CAUSAL_LM"},
            {"revision": "main"},
            {"layers_to_transform": [2, 1, 0]},
            {"sites": ["up", "v", "q"]},
        ],
    )
    def test_ignores_what_computes_the_same(self, folder, before, change):
        folder.change_config(**change)
        assert load_adapter(folder.path).content_hash == before

    @pytest.mark.parametrize(
        "change", [{"activation": "relu"}, {"generator_input": "attention_input"}, {"sites": ["k", "v", "up"]}]
    )
    def test_sees_what_computes_otherwise(self, folder, before, change):
        folder.change_config(**change)
        assert load_adapter(folder.path).content_hash != before

    @shares_folder
    @given(data=st.data())
    def test_sees_one_bit_of_any_weight(self, folder, config, generators_for, data):
        generators = generators_for()
        save_adapter(folder.path, config, generators)
        before = load_adapter(folder.path).content_hash
        layer = data.draw(st.sampled_from(sorted(generators)))
        tensor = data.draw(st.sampled_from(sorted(generators[layer].named_tensors())))
        values = generators[layer].named_tensors()[tensor].view(-1).view(torch.int32)
        # A flip of the lowest bit never makes a float infinite.
        values[data.draw(st.integers(0, len(values) - 1))] ^= 1
        save_adapter(folder.path, config, generators)
        assert load_adapter(folder.path).content_hash != before

    def test_sees_the_dtype(self, folder, before, config, generators_for):
        save_adapter(folder.path, config, {i: w.to("cpu", torch.float64) for i, w in generators_for().items()})
        assert load_adapter(folder.path).content_hash != before

    def test_sees_layers_swapped(self, folder, before, config, generators_for):
        generators = generators_for()
        save_adapter(folder.path, config, {0: generators[1], 1: generators[0], 2: generators[2]})
        assert load_adapter(folder.path).content_hash != before

    def test_weights_file_is_read_once(self, folder, monkeypatch):
        reads = []
        read_bytes = type(folder.path).read_bytes
        monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: reads.append(self.name) or read_bytes(self))
        load_adapter(folder.path)
        assert reads == ["adapter_config.json", "adapter_model.safetensors"]


def refuses(folder, *parts):
    with pytest.raises(AdapterError) as refusal:
        load_adapter(folder.path)
    for part in parts:
        assert str(part) in str(refusal.value)


class TestRefusedConfig:
    @pytest.mark.parametrize("content", [b"", b"{", b"{'r': 1}", b"\xff\xfe\x00", b"[" * 100_000])
    def test_malformed_json(self, folder, content):
        folder.config_file.write_bytes(content)
        refuses(folder, f"{folder.config_file}: not valid JSON", "expected a JSON object")

    @pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("null", "NoneType"), ('"PARADE"', "str")])
    def test_json_that_is_no_object(self, folder, content, kind):
        folder.config_file.write_text(content)
        refuses(folder, f"{folder.config_file}: holds a JSON {kind}; expected an object")

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"peft_type": "LORA"}, "peft_type is 'LORA'; expected 'PARADE'"),
            ({"pooler": "mean"}, "pooler is 'mean'; expected one of"),
            ({"rank": 4}, "unknown key 'rank'; known are"),
        ],
    )
    def test_values_are_refused_with_the_files_name(self, folder, change, expected):
        folder.change_config(**change)
        refuses(folder, f"{folder.config_file}: {expected}")

    @shares_folder
    @given(content=st.binary(max_size=64))
    def test_any_bytes(self, folder, content):
        folder.config_file.write_bytes(content)
        refuses(folder, folder.config_file)

    def test_config_alone_is_enough_for_load_config(self, folder, config):
        folder.weights_file.unlink()
        assert load_config(folder.path) == config


class TestRefusedWeights:
    @pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 64, b"\xff" * 64, pickle.dumps({"a": 1})])
    def test_no_safetensors(self, folder, content):
        folder.weights_file.write_bytes(content)
        refuses(folder, f"{folder.weights_file}: not a readable safetensors file", "a complete one (no pickle)")

    def test_pytorch_pickle_under_the_safetensors_name(self, folder):
        torch.save({"a": torch.ones(2)}, folder.weights_file)
        refuses(folder, f"{folder.weights_file}: not a readable safetensors file", "no pickle")

    @shares_folder
    @given(data=st.data())
    def test_truncated_anywhere(self, folder, config, generators_for, data):
        save_adapter(folder.path, config, generators_for())
        content = folder.weights_file.read_bytes()
        folder.weights_file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        refuses(folder, f"{folder.weights_file}: not a readable safetensors file")

    @shares_folder
    @given(data=st.data())
    def test_a_flipped_byte_of_the_header_is_an_error_with_the_files_name_or_harmless(
        self, folder, config, generators_for, data
    ):
        save_adapter(folder.path, config, generators_for())
        content = bytearray(folder.weights_file.read_bytes())
        content[data.draw(st.integers(0, 600))] ^= data.draw(st.integers(1, 255))
        folder.weights_file.write_bytes(content)
        try:
            load_adapter(folder.path)
        except AdapterError as error:
            message = str(error)
        else:
            return
        assert str(folder.weights_file) in message

    def test_dtype_that_pytorch_does_not_know(self, folder):
        header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
        folder.weights_file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00")
        refuses(folder, folder.weights_file)

    @pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
    def test_only_pickled_weights(self, folder, name):
        folder.weights_file.rename(folder.path / name)
        refuses(folder, f"{folder.weights_file}: no such file", f"{name} is not read", "only safetensors", "no pickle")


def test_public_names_are_sorted_and_exist():
    assert all(hasattr(vllm_parade.adapter, name) for name in vllm_parade.adapter.__all__)


def test_loads_without_vllm_triton_and_transformers():
    program = (
        "import sys, vllm_parade.adapter; print([m for m in ('vllm', 'triton', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
