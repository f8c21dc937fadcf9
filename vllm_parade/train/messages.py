# SPDX-License-Identifier: Apache-2.0
"""Conversations as messages, rendered like the messages of a /v1/chat/completions request."""

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["ROLES", "Message", "answer_span", "as_messages", "render", "render_ids"]

ROLES = ("system", "user", "assistant", "tool")
# The first token of any answer differs from that of at least one of these; so does its last token.
OTHER_ANSWERS = ("0", "w")


class Message(NamedTuple):
    """A message of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str


def as_messages(values: Any) -> tuple[Message, ...]:
    """Check a list of `{"role": ..., "content": ...}`. Messages after the last answer are dropped.

    Raises:
        ValueError: names the message, the reason and what was expected.
    """
    if not isinstance(values, list) or not values:
        raise ValueError("messages must be a list with at least one question and its answer")
    messages = tuple(_message(number, value) for number, value in enumerate(values, 1))
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise ValueError("messages hold no message of the role assistant, so there is nothing to learn; add an answer")
    if answers[-1] == 0:
        raise ValueError("message 1 is an answer without a question; begin with a message of the role user")
    return messages[: answers[-1] + 1]


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= set(value):
        raise ValueError(f'message {number} is {value!r}; expected {{"role": ..., "content": ...}}')
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content:
        raise ValueError(f"message {number} has the content {content!r}; expected a non-empty string")
    return Message(role, content)


def render(tokenizer: Any, messages: Sequence[Message], *, generate: bool = True) -> str:
    """The text of a conversation in the tokenizer's chat template.

    Args:
        generate: end with the generation prompt, where the next answer begins

    Raises:
        ValueError: the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    values = [message._asdict() for message in messages]
    try:
        return tokenizer.apply_chat_template(values, add_generation_prompt=generate, tokenize=False)
    # Templates raise TemplateError. The others come from input that a template does not handle.
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(f"the chat template refuses messages of the roles {roles}: {error}") from error


def render_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation with the generation prompt."""
    return tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]


def answer_span(tokenizer: Any, messages: Sequence[Message], index: int, ids: list[int]) -> tuple[int, int]:
    """The span of an earlier answer in a rendered conversation, without the end-of-turn token.

    The conversation is rendered again with other answers in its place; the tokens that change are the answer. This
    does not depend on the template. If the template changes an answer, e.g. drops its reasoning, the span is that of
    the changed answer.

    Args:
        messages: the conversation
        index: index of the answer in `messages`
        ids: result of `render_ids` for `messages`

    Returns:
        start and end in `ids`; a token with a part of the answer and other text belongs to the span
    """
    before = after = len(ids)
    for content in OTHER_ANSWERS:
        others = [*messages[:index], messages[index]._replace(content=content), *messages[index + 1 :]]
        other = render_ids(tokenizer, others)
        before = min(before, common_prefix(ids, other))
        after = min(after, common_prefix(ids[::-1], other[::-1]))
    return before, max(len(ids) - after, before)


def common_prefix(first: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = zip(first, other, strict=False)
    return next((number for number, (one, two) in enumerate(pairs) if one != two), min(len(first), len(other)))
