# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from vllm_parade.adapter import AdapterConfig, AdapterError, BaseModelShape, load_adapter, save_adapter


def refusal_of(folder, shape=None, **limits):
    with pytest.raises(AdapterError) as refusal:
        load_adapter(folder.path, shape, **limits)
    return str(refusal.value)


@pytest.fixture(params=["base model known", "base model unknown"])
def any_shape(request, shape):
    return shape if request.param == "base model known" else None


@pytest.mark.parametrize("name", ["down.weight", "pooler.query", "pooler.weight", "up.weight", "up.bias"])
@pytest.mark.parametrize("layer", [0, 1])
def test_missing_tensor(folder, any_shape, tensor_key, layer, name):
    folder.change_tensors({tensor_key(layer, name): None})
    message = refusal_of(folder, any_shape)
    assert f"{folder.weights_file}: tensor {tensor_key(layer, name)!r} is missing; expected [" in message


@pytest.mark.parametrize(
    ("layer", "name", "given", "expected"),
    [
        (1, "down.weight", (4, 9), "[4, 8], [r, hidden size]"),
        (1, "down.weight", (8, 4), "[4, 8]"),
        (0, "down.weight", (5, 8), "[4, 8]"),
        (0, "down.weight", (4, 8, 1), "[4, "),
        (0, "down.weight", (), "[4, "),
        (0, "down.weight", (4, 0), "[4, "),
        (0, "pooler.query", (4, 2), "[2, 4], [num_capsules, r]"),
        (2, "pooler.weight", (2, 4, 4), "[2, 4, 2], [num_capsules, r, r / num_capsules]"),
        (1, "up.weight", (27, 4), "[28, 4], [widths of the sites together, r]"),
        (0, "up.weight", (0, 4), ", 4]"),
        (0, "up.bias", (27,), "[28], [widths of the sites together]"),
        (0, "up.bias", (28, 1), "[28]"),
    ],
)
def test_misshapen_tensor(folder, any_shape, tensor_key, layer, name, given, expected):
    folder.change_tensors({tensor_key(layer, name): torch.ones(given)})
    message = refusal_of(folder, any_shape)
    assert f"{folder.weights_file}: tensor {tensor_key(layer, name)!r} has shape {list(given)}; expected" in message
    assert expected in message


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.1.parade_generator.down.bias",
        "base_model.model.model.layers.01.parade_generator.down.weight",
        "base_model.model.model.layers.1.parade_generator.default.down.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.other.layers.1.parade_generator.down.weight",
        "zeros",
    ],
)
def test_superfluous_tensor(folder, any_shape, name):
    folder.change_tensors({name: torch.zeros(4, 8)})
    message = refusal_of(folder, any_shape)
    assert f"{folder.weights_file}: tensor {name!r} is superfluous; expected down.weight, pooler.query" in message
    assert "in 3 layers, 0 to 2" in message


def test_superfluous_pooler_tensor_of_another_pooler(folder, any_shape, tensor_key):
    folder.change_config(pooler="dynamic_routing")
    assert f"{tensor_key(0, 'pooler.query')!r} is superfluous" in refusal_of(folder, any_shape)


def test_layer_beyond_the_base_model(folder, shape, tensor_key):
    message = refusal_of(folder, replace(shape, num_layers=2))
    assert f"tensor {tensor_key(2, 'down.weight')!r} is superfluous; expected" in message
    assert "in 2 layers, 0 to 1" in message


def test_gap_between_layers(folder, tensor_key):
    names = ["down.weight", "pooler.query", "pooler.weight", "up.weight", "up.bias"]
    folder.change_tensors({tensor_key(1, name): None for name in names})
    assert f"{tensor_key(1, 'down.weight')!r} is missing" in refusal_of(folder)


def test_absurd_layer_number_is_refused_at_once(folder, any_shape, tensor_key):
    folder.change_tensors({tensor_key(999_999, "down.weight"): torch.ones(4, 8)})
    assert "parade_generator" in refusal_of(folder, any_shape)


def test_no_generator_at_all(folder, any_shape):
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}
    save_file(lora, folder.weights_file)
    message = refusal_of(folder, any_shape)
    assert f"{folder.weights_file}: holds no generator; expected tensors named like 'base_model.model." in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_not_finite(folder, any_shape, tensor_key, value, dtype):
    tensor = torch.ones(28, dtype=dtype)
    tensor[5] = value
    folder.change_tensors({tensor_key(1, "up.bias"): tensor})
    message = refusal_of(folder, any_shape)
    assert f"{folder.weights_file}: tensor {tensor_key(1, 'up.bias')!r} holds NaN or infinity in 1 places" in message
    assert "expected finite numbers" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_wrong_dtype(folder, any_shape, tensor_key, dtype):
    folder.change_tensors({tensor_key(0, "down.weight"): torch.ones(4, 8).to(dtype)})
    message = refusal_of(folder, any_shape)
    assert f"{folder.weights_file}: tensor {tensor_key(0, 'down.weight')!r} is {dtype}; expected one of" in message
    assert "torch.bfloat16" in message


def test_rank_over_the_limit(folder, any_shape):
    message = refusal_of(folder, any_shape, max_rank=3)
    assert f"{folder.config_file}: r is 4; expected at most 3: raise --max-parade-rank" in message
    assert load_adapter(folder.path, any_shape, max_rank=4).config.r == 4


def test_site_that_is_not_served(folder, any_shape):
    message = refusal_of(folder, any_shape, sites=["q", "v"])
    assert f"{folder.config_file}: sites names 'up'; expected a list out of q, v" in message
    assert "add up to --parade-sites" in message
    assert load_adapter(folder.path, any_shape, sites=["up", "v", "q", "gate"])


def test_site_that_the_base_model_lacks(folder):
    message = refusal_of(folder, BaseModelShape(8, 3, {"q": 8, "k": 4, "v": 4}))
    assert (
        f"{folder.config_file}: sites names 'up'; expected a list out of q, k, v, which the base model has" in message
    )


def test_layers_to_transform_beyond_the_base_model(folder, shape):
    folder.change_config(layers_to_transform=[0, 3])
    message = refusal_of(folder, shape)
    assert f"{folder.config_file}: layers_to_transform names layer 3; expected 0 to 2" in message


def test_adapter_of_a_wider_base_model(folder, shape, tensor_key):
    message = refusal_of(folder, replace(shape, hidden_size=16))
    assert f"{tensor_key(0, 'down.weight')!r} has shape [4, 8]; expected [4, 16]" in message


@pytest.mark.parametrize("change", [{"down": torch.full((4, 8), torch.nan)}, {"query": None}, {"up": torch.ones(3, 4)}])
def test_nothing_is_written_when_saving_is_refused(tmp_path, config, generators_for, change):
    generators = generators_for()
    generators[1] = replace(generators[1], **change)
    with pytest.raises(AdapterError, match=re.escape(str(tmp_path / "new" / "adapter_model.safetensors"))):
        save_adapter(tmp_path / "new", config, generators)
    assert not (tmp_path / "new").exists()


def test_saving_wants_the_layers_that_the_config_names(tmp_path, generators_for):
    config = AdapterConfig(r=4, num_capsules=2, layers_to_transform=(0, 2))
    with pytest.raises(AdapterError, match="layers.1.parade_generator.down.weight' is superfluous"):
        save_adapter(tmp_path / "new", config, generators_for())
