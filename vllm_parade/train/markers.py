# SPDX-License-Identifier: Apache-2.0
"""Finds the tokens that begin questions and answers in a chat template."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from vllm_parade.adapter.turns import Turn, TurnMarkers, find_turns
from vllm_parade.train.messages import Message, common_prefix, render

__all__ = ["find_markers"]

# Messages whose first or last characters merge with the surrounding text in some tokenizers.
CONTENTS = ("a", " ", "\n", " \n", "1", "", "  b", "\n\nb")
SYSTEM = "You are the 7th."
ROLES = ("user", "assistant", "user", "assistant")
# Number of special tokens between two messages that are tried as the first token of a marker.
SPECIAL_TOKENS = 3


class _Unusable(ValueError):
    """A chat template has no usable markers. The message gives the reason."""


@dataclass(frozen=True)
class _Form:
    """A conversation's text without its messages. Each message lies between two pieces."""

    roles: tuple[str, ...]
    generate: bool
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, roles: tuple[str, ...], *, generate: bool) -> "_Form":
        names = [f"Message{number}x" for number in range(len(roles))]
        text = render(tokenizer, list(map(Message, roles, names)), generate=generate)
        pieces = re.split("|".join(names), text)
        if re.findall(r"Message\dx", text) != names:
            raise _Unusable(f"it does not write each message once and in order: {text!r}")
        return cls(roles, generate, tuple(pieces))

    def spans(self, text: str, contents: Sequence[str]) -> list[tuple[int, int]]:
        """Spans of the pieces in a conversation's text. The template may strip whitespace around messages."""
        messages = [rf"\s*{re.escape(content.strip())}\s*" for content in contents] + [""]
        parts = (f"({re.escape(piece)}){message}" for piece, message in zip(self.pieces, messages, strict=True))
        found = re.fullmatch("".join(parts), text)
        if found is None:
            raise _Unusable(f"it changes the text of messages: {list(contents)} become {text!r}")
        return [found.span(number + 1) for number in range(len(self.pieces))]


@dataclass(frozen=True)
class _Case:
    """A rendered conversation, with the expected positions of its markers."""

    text: str
    ids: list[int]
    starts: list[int]
    """Tokens at which the second and later questions begin."""
    ends: list[int]
    """Tokens at which the markers of answers begin."""


def find_markers(tokenizer: Any) -> TurnMarkers:
    """The start and end tokens of instructions in the tokenizer's chat template.

    Found by rendering test conversations. The start tokens are the longest sequence that begins every question after
    the first. The end tokens are the longest sequence that begins every answer and every generation prompt. A
    generation prompt may have more tokens after them.

    Args:
        tokenizer: a Transformers tokenizer with a chat template

    Raises:
        ValueError: the template has no such tokens, or a scan would miss a message; says why, and names the remedy.
    """
    try:
        return _find(tokenizer)
    except ValueError as error:
        raise ValueError(
            f"--turns cannot use the chat template of {tokenizer.name_or_path}: {error}; train without --turns, or use "
            "a model whose template marks messages with special tokens"
        ) from error


def _find(tokenizer: Any) -> TurnMarkers:
    """Try the first special token that can begin a message, then the next ones."""
    first: _Unusable | None = None
    for choice in sorted(product(range(SPECIAL_TOKENS), repeat=2), key=sum):
        try:
            return _chosen(tokenizer, dict(zip(("user", "assistant"), choice, strict=True)))
        except _Unusable as error:
            first = first or error
    assert first is not None
    raise first


def _chosen(tokenizer: Any, choice: dict[str, int]) -> TurnMarkers:
    cases = list(_cases(tokenizer, choice))
    start = _common([case.ids[position:] for case in cases for position in case.starts])
    end = _common([case.ids[position:] for case in cases for position in case.ends])
    if not start or not end:
        raise _Unusable(f"{'questions' if not start else 'answers'} do not always begin with the same token")
    markers = TurnMarkers(tuple(start), tuple(end))
    for case in cases:
        _check(case, markers)
    return markers


def _check(case: _Case, markers: TurnMarkers) -> None:
    """Refuse markers with which a scan misses a message."""
    found = find_turns(case.ids, markers)
    first = found[0].start if found[0].start < case.ends[0] else 0
    ends = [position + len(markers.end) for position in case.ends]
    expected = [Turn(*borders) for borders in zip([first, *case.starts], ends, strict=True)]
    if found != expected or case.ids[first : first + len(markers.start)] != list(markers.start):
        wanted, got = (", ".join(f"[{turn.start}, {turn.end})" for turn in turns) for turns in (expected, found))
        tokens = f"{list(markers.start)} and {list(markers.end)}"
        raise _Unusable(f"a scan for tokens {tokens} finds turns {got} in {case.text!r}; expected {wanted}")


def _cases(tokenizer: Any, choice: dict[str, int]) -> Iterator[_Case]:
    """Conversations with all contents, as history and with a generation prompt, with and without a system message."""
    added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, added)) or "(?!)")
    # The text after an answer, and after a question, at the end of a conversation.
    closed = {
        role: _Form.of(tokenizer, ROLES[:length], generate=False).pieces[-1]
        for length, role in ((2, "assistant"), (3, "user"))
    }
    forms = [_Form.of(tokenizer, ROLES, generate=False), _Form.of(tokenizer, ROLES[:3], generate=True)]
    for form in (*forms, *_with_system(tokenizer, forms)):
        offsets = _offsets(form, closed, special, choice)
        for contents in _contents(form.roles):
            text = render(tokenizer, list(map(Message, form.roles, contents)), generate=form.generate)
            spans = form.spans(text, contents)
            ids = _ids(tokenizer, text)
            at = {number: _token(tokenizer, text, ids, spans[number][0] + offset) for number, offset in offsets.items()}
            following = (*form.roles, "assistant")
            starts = [at[number] for number in at if following[number] == "user"]
            yield _Case(text, ids, starts, [at[number] for number in at if following[number] == "assistant"])


def _with_system(tokenizer: Any, forms: Sequence[_Form]) -> Iterator[_Form]:
    for form in forms:
        try:
            yield _Form.of(tokenizer, ("system", *form.roles), generate=form.generate)
        # The template does not support system messages, or writes them elsewhere.
        except ValueError:
            continue


def _contents(roles: tuple[str, ...]) -> Iterator[list[str]]:
    count = len(CONTENTS)
    for question, answer in product(range(count), repeat=2):
        numbers = {"user": [question + 2, question], "assistant": [answer + 3, answer]}
        left = {role: iter(values) for role, values in numbers.items()}
        yield [SYSTEM if role == "system" else CONTENTS[next(left[role]) % count] for role in roles]


def _offsets(form: _Form, closed: dict[str, str], special: re.Pattern[str], choice: dict[str, int]) -> dict[int, int]:
    """By piece number, the offset in the piece at which the next message's marker begins."""
    offsets = {}
    following = form.roles + ("assistant",) * form.generate
    for number, (before, role) in enumerate(zip(following, following[1:], strict=False), 1):
        if "system" not in (before, role):
            positions = _positions(form.pieces[number], closed[before], role, special)
            offsets[number] = positions[min(choice[role], len(positions) - 1)]
    return offsets


def _positions(piece: str, closed: str, role: str, special: re.Pattern[str]) -> list[int]:
    """Offsets of the special tokens in a piece, except those that only close the previous message."""
    every = list(special.finditer(piece))
    positions = [found.start() for found in every if not closed.startswith(piece[: found.end()])]
    if not positions and role == "assistant":
        # The tokens that close a question also begin the answer.
        positions = [found.start() for found in every]
    if not positions:
        what = "a question" if role == "user" else "an answer"
        raise _Unusable(f"it begins {what} with the text {piece!r} and no special token, so messages can merge with it")
    return positions


def _token(tokenizer: Any, text: str, ids: list[int], position: int) -> int:
    """Index of the token that begins at a character position of a text."""
    head = _ids(tokenizer, text[:position])
    if ids[: len(head)] != head:
        raise _Unusable(f"a token crosses the boundary before {text[position:]!r} in {text!r}")
    return len(head)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(tails: list[list[int]]) -> list[int]:
    """The longest common prefix."""
    shortest = tails[0]
    for tail in tails:
        shortest = shortest[: common_prefix(shortest, tail)]
    return shortest
