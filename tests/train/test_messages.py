# SPDX-License-Identifier: Apache-2.0
"""Conversations: how they are checked and rendered, and which tokens are learnt."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.templates import FORMATS
from vllm_parade.adapter.turns import TurnMarkers, find_turns
from vllm_parade.train.data import IGNORED_LABEL, encode, encode_prompt
from vllm_parade.train.markers import find_markers
from vllm_parade.train.messages import Message, answer_span, as_messages, render_ids
from vllm_parade.train.readers import Example

SYSTEM, TOOL = Message("system", "Reference:\nname[Aromi]"), Message("tool", "3 found")
HISTORY = (
    SYSTEM,
    Message("user", "Which pub?"),
    Message("assistant", "The Aromi pub."),
    Message("user", "Where?"),
    Message("assistant", "The river"),
    Message("user", "And again?"),
)
CONVERSATION = Example(HISTORY, ("By the river.",))


def values(*messages: Message) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def learnt(tokenizer: Any, pair: dict[str, list[int]]) -> list[str]:
    """Text of each run of tokens with labels."""
    runs: list[list[int]] = []
    before = IGNORED_LABEL
    for token, label in zip(pair["input_ids"], pair["labels"], strict=True):
        if label != IGNORED_LABEL:
            assert label == token
            if before == IGNORED_LABEL:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


def test_messages_are_checked() -> None:
    answer = Message("assistant", "So.")
    checked = as_messages(values(*HISTORY, answer, TOOL, HISTORY[1]))
    assert checked == (*HISTORY, answer)
    for given, reason in (
        ([], "messages must be a list with at least one question and its answer"),
        ("words", "messages must be a list"),
        (values(*HISTORY[:2]), "messages hold no message of the role assistant, so there is nothing to learn"),
        (values(answer), "message 1 is an answer without a question"),
        (["words"], "message 1 is 'words'; expected "),
        ([*values(SYSTEM), {"role": "user"}], "message 2 is {'role': 'user'}; expected "),
        (values(Message("human", "Why?"), answer), "message 1 has the role 'human'; expected one of system, user, "),
        (values(Message("user", ""), answer), "message 1 has the content ''; expected a non-empty string"),
        ([{"role": "user", "content": None}], "message 1 has the content None; expected a non-empty string"),
    ):
        with pytest.raises(ValueError, match=r"^messages? ") as found:
            as_messages(given)
        assert str(found.value).startswith(reason)


@pytest.mark.parametrize("messages", [HISTORY, HISTORY[1:], (*HISTORY[:5], TOOL)])
def test_a_prompt_is_rendered_as_the_server_renders_it(smollm: str, messages: tuple[Message, ...]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    served = tokenizer.apply_chat_template(values(*messages), add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, messages) == served
    (pair,) = encode(tokenizer, [Example(messages, ("So.",))], markers=find_markers(tokenizer))
    assert pair["input_ids"][: len(served)] == served


def test_without_markers_only_the_last_answer_is_learnt(smollm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    (pair,) = encode(tokenizer, [CONVERSATION])
    assert learnt(tokenizer, pair) == ["By the river.<|im_end|>"]


@pytest.mark.parametrize("name", [name for name, known in FORMATS.items() if known.start])
def test_all_answers_are_learnt_with_their_end(smollm: str, name: str) -> None:
    tokenizer = FORMATS[name].tokenizer(smollm)
    history = HISTORY[1:] if name in ("mistral3", "gemma") else HISTORY
    (pair,) = encode(tokenizer, [Example(history, ("By the river.",))], markers=find_markers(tokenizer))
    first, second, last = learnt(tokenizer, pair)
    ends = {"llama3": "<|eot_id|>", "phi3": "<|end|>", "gemma": "<end_of_turn>", "deepseek_r1": "<end>"}
    end = ends.get(name, "<|im_end|>")
    # strip(): whitespace beside the answer is not compared (Phi-3, Gemma).
    assert (first.strip(), second.strip()) == (f"The Aromi pub.{end}", f"The river{end}")
    assert last == "By the river.<|im_end|>"


@pytest.mark.parametrize(
    "answer", ["0", "w", "  two blanks", "\n\nlines\n\n", "<|im_end|>", "Where?", "\u00e9\U0001f600"]
)
def test_an_answer_is_found_whatever_it_is(smollm: str, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    history = (HISTORY[1], Message("assistant", answer), HISTORY[3])
    ids = render_ids(tokenizer, history)
    start, end = answer_span(tokenizer, history, 1, ids)
    assert answer in tokenizer.decode(ids[start:end])
    # Leading blanks can share a token with the line end before them.
    assert tokenizer.decode(ids[start:end]).strip("\n") in (answer.strip("\n"), answer)
    turns = find_turns(ids, find_markers(tokenizer))
    assert turns[0].end <= start <= end <= turns[1].start


def test_pairs_are_encoded_as_before(smollm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    pair = Example("Why?", ("so", "because"))
    assert encode(tokenizer, [pair], markers=find_markers(tokenizer)) == encode(tokenizer, [pair])


@pytest.mark.parametrize(
    "example",
    [
        Example((SYSTEM, Message("assistant", "Hello."), *HISTORY[1:]), ("So.",)),
        Example("Why?", ("so: <|im_start|>user\nHow?",)),
        Example((*HISTORY[:2], Message("assistant", "<|im_start|>user"), *HISTORY[3:]), ("So.",)),
    ],
    ids=["before", "last", "earlier"],
)
def test_answers_outside_of_turns_are_refused(smollm: str, example: Example) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    markers = find_markers(tokenizer)
    example = Example(example.prompt, example.responses, "--train_file f, line 3")
    with pytest.raises(
        ValueError, match=r"^--train_file f, line 3: the answer at token \d+ does not begin after an in"
    ):
        encode(tokenizer, [example], markers=markers)
    assert encode(tokenizer, [example])


def test_other_templates_are_refused(smollm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    with pytest.raises(ValueError, match=r"^an example: a conversation has no template plain; give --template chat"):
        encode(tokenizer, [CONVERSATION], "plain")
    with pytest.raises(ValueError, match=r"does not begin after an instruction's end"):
        encode(tokenizer, [Example("Why?", ("so",))], "plain", markers=TurnMarkers((1, 4093), (1, 520, 9531)))
    tokenizer = FORMATS["gemma"].tokenizer(smollm)
    with pytest.raises(ValueError, match="refuses messages of the roles system, .*: System role not supported"):
        encode(tokenizer, [CONVERSATION])
