# SPDX-License-Identifier: Apache-2.0
"""ServingConfig without vLLM: accepted values, refused values and their messages."""

import re

import pytest

from vllm_parade import config as config_module
from vllm_parade.config import ParadeModule, ServingConfig, ServingConfigError, given_sites, traced_files


def test_defaults():
    config = ServingConfig()
    assert not config.enable_parade
    assert (config.max_parades, config.max_cpu_parades, config.max_parade_rank) == (32, None, 16)
    assert config.sites == ("q", "v", "up")


def test_host_memory_must_hold_all_modules():
    modules = [f"m{number}=/x/{number}" for number in range(5)]
    assert ServingConfig(True, parade_modules=modules, max_parades=2).least_cpu_parades == 5
    assert ServingConfig(True, parade_modules=modules, max_parades=8).least_cpu_parades == 8


@pytest.mark.parametrize(
    "value",
    ["a=/x/a", " a = /x/a ", '{"name": "a", "path": "/x/a"}', {"name": "a", "path": "/x/a"}, ParadeModule("a", "/x/a")],
)
def test_forms_of_a_module(value):
    assert ParadeModule.parse(value) == ParadeModule("a", "/x/a")


def test_path_of_a_module_may_hold_an_equals_sign():
    assert ParadeModule.parse("a=/x/r=12") == ParadeModule("a", "/x/r=12")


def test_parent_of_a_module_may_be_null():
    module = ParadeModule.parse('{"name": "a", "path": "/x/a", "base_model_name": null}')
    assert module == ParadeModule("a", "/x/a", None)


@pytest.mark.parametrize(
    "value", ["a", "=/x", "a=", "{}", '{"name": "a"}', '{"path": "/x"}', '{"name": "a", "path": "/x", "r": 1}', 5, None]
)
def test_a_module_that_is_none(value):
    with pytest.raises(ServingConfigError, match="--parade-modules got .*expected name=path"):
        ParadeModule.parse(value)


def test_a_module_in_broken_json():
    with pytest.raises(ServingConfigError, match="--parade-modules got .*which is not valid JSON"):
        ParadeModule.parse('{"name": "a"')


@pytest.mark.parametrize("values", [{"parade_modules": "a=/x/a"}, {"parade_modules": {"name": "a", "path": "/x/a"}}])
def test_one_module_needs_no_list(values):
    config = ServingConfig.from_dict({"enable_parade": True, **values})
    assert config.parade_modules == (ParadeModule("a", "/x/a"),)


@pytest.mark.parametrize(("cache", "rows"), [(64, 1 + 7 + 64), (0, 8)])
def test_every_running_request_has_a_row(cache, rows):
    assert ServingConfig(parade_vector_cache=cache).num_rows(7) == rows


def test_one_site_needs_no_list():
    assert ServingConfig.from_dict({"enable_parade": True, "parade_sites": "up"}).sites == ("up",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_parades": 0}, "--max-parades is 0; expected a positive whole number"),
        ({"max_parades": "3"}, "--max-parades is '3'; expected a positive whole number"),
        ({"max_parade_rank": 1.5}, "--max-parade-rank is 1.5; expected a positive whole number"),
        ({"parade_vector_cache": -1}, "--parade-vector-cache is -1; expected a whole number, 0 or more"),
        ({"parade_vector_cache": "8"}, "--parade-vector-cache is '8'; expected a whole number, 0 or more"),
        ({"max_cpu_parades": True}, "--max-cpu-parades is True; expected a positive whole number"),
        ({"parade_sites": ("q", "o")}, "--parade-sites is ['q', 'o']; expected some of q, k, v, gate, up"),
        ({"parade_modules": ["a=/x", "a=/y"]}, "--parade-modules names 'a' twice; give every adapter its own name"),
        (
            {"max_parades": 4, "max_cpu_parades": 3},
            "--max-cpu-parades is 3, less than --max-parades, 4; host memory also holds the adapters on the device: "
            "raise the first or lower the second",
        ),
        (
            {"max_parades": 1, "max_cpu_parades": 1, "parade_modules": ["a=/x", "b=/y"]},
            "--max-cpu-parades is 1, but --parade-modules names 2 adapters; raise it, or leave it out",
        ),
        ({"max_parade": 3}, "unknown PARADE option 'max_parade'; known are enable_parade, max_cpu_parades"),
    ],
)
def test_refusals_name_flag_value_and_remedy(values, message):
    with pytest.raises(ServingConfigError, match="^" + re.escape(message)):
        ServingConfig.from_dict({"enable_parade": True, **values})


def test_modules_without_enabling_are_refused():
    with pytest.raises(
        ServingConfigError, match="^--parade-modules needs --enable-parade; add it, or drop the modules"
    ):
        ServingConfig.from_dict({"parade_modules": ["a=/x"]})


def test_sizes_without_enabling_are_harmless():
    assert not ServingConfig.from_dict({"max_parades": 3}).enable_parade


def test_absent_values_are_defaults():
    assert ServingConfig.from_dict({"enable_parade": True, "max_cpu_parades": None}) == ServingConfig(True)


def test_order_of_sites_carries_no_meaning():
    assert ServingConfig(True, parade_sites=("up", "k", "q")).sites == ("q", "k", "up")
    assert given_sites([("gate",), ("k", "q")]) == ("q", "k", "v", "gate", "up")
    assert given_sites([]) == ("q", "v", "up")


def test_any_change_of_traced_code_changes_the_compile_cache_key(monkeypatch, tmp_path):
    copies = [tmp_path / path.name for path in traced_files()]
    for path, copy in zip(traced_files(), copies, strict=True):
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(config_module, "traced_files", lambda: sorted(tmp_path.glob("*.py")))
    config = ServingConfig(True)
    source = config.hashed(8)["source"]
    assert config.hashed(8)["source"] == source
    for copy in copies:
        content = copy.read_bytes()
        copy.write_bytes(content + b"\n")
        assert config.hashed(8)["source"] != source, copy.name
        copy.write_bytes(content)
    copies[-1].rename(tmp_path / "other.py")
    assert config.hashed(8)["source"] != source


def test_traced_files_are_those_of_the_layers():
    """The hooks, the custom op, and the files that define the scaled modules and the table sizes."""
    assert {path.parent.name for path in traced_files()} == {"layers"}
    assert {path.name for path in traced_files()} >= {"model.py", "generator.py", "sites.py", "batch.py"}
