# SPDX-License-Identifier: Apache-2.0
"""Flags of `vllm serve` from values in a YAML file."""

import pytest

pytest.importorskip("ray.serve")

from vllm_parade.cluster.engine import flag, parse
from vllm_parade.config import CONFIG_KEY


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_model_len", 2048, ["--max-model-len", "2048"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("chat_template", None, []),
        ("served_model_name", ["a", "b"], ["--served-model-name", "a", "b"]),
        ("parade_modules", [{"name": "a", "path": "/x"}], ["--parade-modules", '{"name": "a", "path": "/x"}']),
        ("hf_overrides", {"a": 1}, ["--hf-overrides", '{"a": 1}']),
    ],
)
def test_words(name, value, words) -> None:
    assert flag(name, value) == words


def test_arguments_are_those_of_vllms_command() -> None:
    modules = [{"name": "a", "path": "/x", "base_model_name": None}]
    options = {
        "model": "/m",
        "max-num-seqs": 8,
        "enforce_eager": True,
        "enable_parade": True,
        "parade_modules": modules,
    }
    args = parse({**options, "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}})
    assert (args.model, args.max_num_seqs, args.enforce_eager) == ("/m", 8, True)
    assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 2}
    knobs = args.additional_config[CONFIG_KEY]
    # Without COMMAND_LINE: with it, a bad flag would exit the process instead of raising.
    assert knobs == {"enable_parade": True, "parade_modules": ['{"name": "a", "path": "/x", "base_model_name": null}']}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_modle_len": 1}, "max-modle-len"), ({"max_num_seqs": "many"}, "max-num-seqs"), ({"dtype": "x"}, "dtype")],
)
def test_bad_flags_are_refused_in_vllms_words(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse({"model": "/m", **options})
