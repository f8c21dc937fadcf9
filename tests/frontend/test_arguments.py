# SPDX-License-Identifier: Apache-2.0
"""Flags and keywords, from vLLM's own parser to the engine's config."""

import itertools
import json
from dataclasses import replace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_parade.config import CONFIG_KEY, ParadeModule, ServingConfig
from vllm_parade.frontend.arguments import COMMAND_LINE, KNOBS
from vllm_parade.plugin import register


@pytest.fixture(scope="module")
def parser(model):
    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    # vLLM would look up its default model on the Hugging Face Hub.
    parser.set_defaults(model=model)
    return parser


def engine_args(parser, *arguments):
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(arguments)))


def knobs(args):
    """PARADE's options in EngineArgs."""
    return args.additional_config.get(CONFIG_KEY)


def test_every_knob_is_a_flag_of_one_group_with_a_help_text(parser):
    (group,) = [group for group in parser._action_groups if group.title == "ParadeConfig"]
    flags = {action.dest: action for action in group._group_actions}
    assert set(flags) == set(KNOBS)
    for dest, action in flags.items():
        assert action.option_strings == ["--" + dest.replace("_", "-")]
        assert action.help
        assert action.help.endswith((".", ")"))
    assert "(default: 32)" in flags["max_parades"].help
    assert "(default: 16)" in flags["max_parade_rank"].help
    assert "PARADE" in group.description


def test_help_of_the_group_can_be_shown(parser, monkeypatch):
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", "paradeconfig")
    text = parser.format_help()
    for knob in KNOBS:
        assert "--" + knob.replace("_", "-") in text


def test_without_flags_nothing_is_added(parser):
    assert engine_args(parser).additional_config == {}


def test_values_arrive_with_their_types(parser):
    args = engine_args(
        parser,
        "--enable-parade",
        *("--max-parades", "3", "--max-cpu-parades", "7", "--max-parade-rank", "16"),
        *("--parade-sites", "q", "up"),
        *("--parade-modules", "a=/x/a", '{"name": "b", "path": "/x/b", "base_model_name": "m"}'),
    )
    assert knobs(args) == {
        COMMAND_LINE: True,
        "enable_parade": True,
        "max_parades": 3,
        "max_cpu_parades": 7,
        "max_parade_rank": 16,
        "parade_sites": ["q", "up"],
        "parade_modules": ["a=/x/a", '{"name": "b", "path": "/x/b", "base_model_name": "m"}'],
    }


def test_underscores_in_flags(parser):
    assert knobs(engine_args(parser, "--enable_parade", "--max_parades=3"))["max_parades"] == 3


def test_both_forms_of_a_module_end_in_the_engines_config(parser, adapters):
    a, b = adapters["a"].path, adapters["b"].path
    text = json.dumps({"name": "b", "path": b, "base_model_name": "parent"})
    config = engine_args(parser, "--enable-parade", "--parade-modules", f"a={a}", text).create_engine_config()
    assert ServingConfig.from_vllm_config(config).parade_modules == (
        ParadeModule("a", a),
        ParadeModule("b", b, "parent"),
    )


FLAGS = (["--enable-parade"], ["--max-parades", "3"])
OTHERS = (
    ["--additional-config", '{"mine": {"x": 1}}'],
    ["--additional-config.mine.x", "1"],
    ["--additional-config", '{"mine": {"x": 1}, "parade": {"max_parade_rank": 8}}'],
)


@pytest.mark.parametrize("other", OTHERS, ids=["json", "dotted", "with_parade"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_additional_config_in_any_order(parser, other, order):
    parts = [*FLAGS, other]
    args = engine_args(parser, *(word for index in order for word in parts[index]))
    assert args.additional_config["mine"] == {"x": 1}
    expected = {"enable_parade": True, "max_parades": 3, COMMAND_LINE: True}
    if "max_parade_rank" in other[1]:
        expected["max_parade_rank"] = 8
    assert knobs(args) == expected


def test_dotted_form_of_the_knobs_themselves(parser):
    args = engine_args(parser, "--additional-config.parade.enable_parade", "true", "--max-parades", "2")
    assert knobs(args) == {"enable_parade": True, "max_parades": 2, COMMAND_LINE: True}


def test_yaml_config(parser, adapters, tmp_path):
    a, b = adapters["a"].path, adapters["b"].path
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"enable-parade: true\nmax_parades: 5\nparade-modules:\n  - a={a}\n  - b={b}\nadditional-config:\n  mine: 1\n"
    )
    args = engine_args(parser, "--config", str(file))
    assert args.additional_config["mine"] == 1
    config = args.create_engine_config()
    assert ServingConfig.from_vllm_config(config).max_parades == 5
    assert [module.name for module in ServingConfig.from_vllm_config(config).parade_modules] == ["a", "b"]


def test_yaml_can_leave_it_off(parser, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("enable-parade: false\n")
    assert engine_args(parser, "--config", str(file)).additional_config == {}


def test_flags_of_two_parses_do_not_mix(parser):
    engine_args(parser, "--enable-parade", "--max-parades", "3")
    assert knobs(engine_args(parser, "--enable-parade")) == {"enable_parade": True, COMMAND_LINE: True}
    assert engine_args(parser).additional_config == {}


@pytest.mark.parametrize("arguments", [["--max-parades", "many"], ["--parade-sites", "o"], ["--parade-modules"]])
def test_the_parser_refuses_what_it_can(parser, arguments, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
class TestKeywords:
    def test_folded_into_additional_config(self, cls, model):
        args = cls(model, enable_parade=True, max_parades=2, additional_config={"mine": 1})
        assert args.additional_config == {"mine": 1, CONFIG_KEY: {"enable_parade": True, "max_parades": 2}}

    def test_caller_keeps_his_dict(self, cls, model):
        mine = {"mine": 1, CONFIG_KEY: {"max_parades": 3}}
        args = cls(model, enable_parade=True, additional_config=mine)
        assert mine == {"mine": 1, CONFIG_KEY: {"max_parades": 3}}
        assert knobs(args) == {"max_parades": 3, "enable_parade": True}

    def test_replace_keeps_them(self, cls, model):
        args = replace(cls(model, enable_parade=True), seed=3)
        assert args.seed == 3
        assert knobs(args) == {"enable_parade": True}

    def test_replace_takes_them(self, cls, model):
        assert knobs(replace(cls(model, enable_parade=True), max_parades=4)) == {
            "enable_parade": True,
            "max_parades": 4,
        }

    def test_none_given_leaves_all_alone(self, cls, model):
        assert cls(model).additional_config == {}

    def test_unknown_keywords_are_still_refused(self, cls, model):
        with pytest.raises(TypeError, match="enable_parades"):
            cls(model, enable_parades=True)

    def test_engine_config_can_be_made_twice(self, cls, model):
        args = cls(model, enable_parade=True, skip_tokenizer_init=True)
        first, second = args.create_engine_config(), args.create_engine_config()
        assert ServingConfig.from_vllm_config(first) == ServingConfig.from_vllm_config(second)
        assert knobs(args) == {"enable_parade": True}
