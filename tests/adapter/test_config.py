# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_parade.adapter import SITES, AdapterConfig, AdapterError
from vllm_parade.adapter.config import GENERATOR_INPUTS
from vllm_parade.ops.reference import ACTIVATIONS, POOLERS

configs = st.builds(
    lambda capsules, capsule_size, **rest: AdapterConfig(r=capsules * capsule_size, num_capsules=capsules, **rest),
    capsules=st.integers(1, 8),
    capsule_size=st.integers(1, 8),
    base_model_name_or_path=st.none() | st.text(),
    inference_mode=st.booleans(),
    pooler=st.sampled_from(POOLERS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    sites=st.permutations(SITES).flatmap(lambda sites: st.integers(1, 5).map(lambda count: sites[:count])),
    generator_input=st.sampled_from(GENERATOR_INPUTS),
    layers_to_transform=st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def test_defaults_are_the_papers():
    config = AdapterConfig.from_dict({"peft_type": "PARADE"})
    assert (config.r, config.num_capsules, config.pooler, config.activation) == (12, 4, "attentional_capsule", "gelu")
    assert config.sites == ("q", "v", "up")
    assert config.generator_input == "layer_input"
    assert config.layers_to_transform is None


@given(configs)
def test_survives_json(config):
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(st.permutations(SITES), st.permutations(range(6)))
def test_order_of_lists_carries_no_meaning(sites, layers):
    config = AdapterConfig(sites=tuple(sites), layers_to_transform=tuple(layers))
    assert config.sites == SITES
    assert config.layers_to_transform == (0, 1, 2, 3, 4, 5)


@given(st.sampled_from([*AdapterConfig().to_dict(), "unheard_of"]), json_values)
def test_any_value_is_taken_or_refused_by_name(key, value):
    try:
        AdapterConfig.from_dict({"peft_type": "PARADE", key: value})
    except AdapterError as error:
        message = str(error)
    else:
        return
    assert key in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peft_type", "LORA", "'PARADE'"),
        ("r", 0, "positive whole number"),
        ("r", 12.0, "positive whole number"),
        ("r", True, "positive whole number"),
        ("r", 13, "multiple of num_capsules, 4"),
        ("num_capsules", "4", "positive whole number"),
        ("pooler", "mean", "attentional_capsule, dynamic_routing, last_token"),
        ("activation", "swish", "gelu, relu, silu, tanh"),
        ("activation", ["gelu"], "gelu, relu, silu, tanh"),
        ("generator_input", "embedding", "layer_input, attention_input"),
        ("sites", [], "q, k, v, gate, up"),
        ("sites", "q", None),
        ("sites", ["q", "o"], "q, k, v, gate, up"),
        ("sites", ["q", "q"], "different sites"),
        ("sites", [["q"]], "q, k, v, gate, up"),
        ("layers_to_transform", [], "layer numbers"),
        ("layers_to_transform", 3, "layer numbers"),
        ("layers_to_transform", [-1], "layer numbers"),
        ("layers_to_transform", [1, 1], "different layer numbers"),
        ("base_model_name_or_path", 7, "a string or null"),
        ("inference_mode", "yes", "true or false"),
        ("rank", 8, "known are peft_type"),
    ],
)
def test_refusal_names_key_value_and_expectation(key, value, expected):
    with pytest.raises(AdapterError, match=re.escape(expected or "a list")) as refusal:
        AdapterConfig.from_dict({"peft_type": "PARADE", key: value})
    assert key in str(refusal.value)
    assert key == "rank" or str(value) in str(refusal.value)


def test_peft_type_is_required():
    with pytest.raises(AdapterError, match="peft_type is None; expected 'PARADE'"):
        AdapterConfig.from_dict({"r": 12})


def test_keys_that_peft_adds_are_ignored():
    values = {"peft_type": "PARADE", "auto_mapping": None, "peft_version": "0.18.0"}
    assert AdapterConfig.from_dict(values) == AdapterConfig()


def test_last_token_needs_no_capsules():
    assert AdapterConfig(pooler="last_token", r=13).r == 13
