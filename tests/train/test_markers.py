# SPDX-License-Identifier: Apache-2.0
"""Markers of chat templates: accepted if a scan recovers all messages, otherwise refused."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.templates import FORMATS
from vllm_parade.adapter.turns import find_turns
from vllm_parade.train.markers import find_markers

CONVERSATION = [
    {"role": "user", "content": "  How?\n"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "\n1"},
    {"role": "assistant", "content": "\n\n"},
    {"role": "user", "content": "?"},
]


def test_the_base_models_template(smollm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    markers = find_markers(tokenizer)
    assert tokenizer.decode(markers.start) == "<|im_start|>user"
    assert tokenizer.decode(markers.end) == "<|im_start|>assistant"
    assert markers.max_tokens is None


@pytest.mark.parametrize("name", [name for name, known in FORMATS.items() if known.start])
def test_formats(smollm: str, name: str) -> None:
    known = FORMATS[name]
    tokenizer = known.tokenizer(smollm)
    markers = find_markers(tokenizer)
    assert (tokenizer.decode(markers.start), tokenizer.decode(markers.end)) == (known.start, known.end)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    questions = [tokenizer.decode(ids[turn.start : turn.end]) for turn in find_turns(ids, markers)]
    assert ["How?" in question for question in questions] == [True, False, False]
    assert ["1" in question for question in questions] == [False, True, False]
    assert ["So." in question for question in questions] == [False] * 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama2", r"begins an answer with the text ' \[/INST\] ' and no special token, so messages can merge with it"),
        ("vicuna", r"begins an answer with the text ' ASSISTANT: ' and no special token"),
        ("one_role", r"a scan for tokens \[1\] and \[1\] finds turns"),
        ("last_only", r"does not write each message once and in order: '<\|im_start\|>user\\nMessage"),
        ("shouting", r"does not write each message once and in order"),
        ("raising", r"the chat template refuses messages of the roles user, assistant: no chat model"),
    ],
)
def test_refusals(smollm: str, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as found:
        find_markers(FORMATS[name].tokenizer(smollm))
    assert str(found.value).startswith(f"--turns cannot use the chat template of {smollm}: ")
    assert "train without --turns" in str(found.value)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("template_chatml", "<|im_end|>\n<|im_start|>assistant"),
        ("template_minicpmv45", "<|im_start|>assistant"),
        ("template_basic", None),
        ("template_blip2", None),
        ("template_deepseek_vl2", None),
    ],
)
def test_templates_of_vllm(smollm: str, name: str, end: str | None) -> None:
    vllm = pytest.importorskip("vllm.transformers_utils.chat_templates")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.chat_template = (Path(vllm.__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    if end is None:
        with pytest.raises(ValueError, match="no special token"):
            find_markers(tokenizer)
    else:
        assert tokenizer.decode(find_markers(tokenizer).end) == end
