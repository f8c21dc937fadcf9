# SPDX-License-Identifier: Apache-2.0
"""Finds the turns and instructions of a prompt. Used by training, the tuner and the server."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    """A turn of a conversation, from `start` to the start of the next turn or the end of the sequence.

    The tokens [start, end) are its instruction. Vectors generated from them scale every token of the turn.
    """

    start: int
    end: int


@dataclass(frozen=True)
class TurnMarkers:
    """How an adapter marks its instructions: three keys of adapter_config.json."""

    start: tuple[int, ...]
    """Token ids that begin a turn, e.g. those of `<|im_start|>user`."""
    end: tuple[int, ...]
    """Token ids that end a turn's instruction, e.g. those of `<|im_start|>assistant`."""
    max_tokens: int | None = None
    """Largest number of tokens in an instruction. A longer one keeps its last ones; the others join the turn before."""


def find_turns(tokens: Sequence[int], markers: TurnMarkers | None) -> list[Turn]:
    """The turns of a prompt, from left to right.

    Tokens before the first turn are the base model's. Without markers the whole prompt is one instruction.

    Args:
        tokens: token ids of the prompt, at least one
    """
    if markers is None:
        return [Turn(0, len(tokens))]
    starts = list(_occurrences(tokens, markers.start, 0, len(tokens)))
    # A prompt without start tokens is one turn, which has no start tokens to skip.
    skip = len(markers.start) if starts else 0
    turns = []
    for start, limit in zip(starts or [0], [*starts[1:], len(tokens)], strict=True):
        found = next(_occurrences(tokens, markers.end, start + skip, limit), limit)
        end = min(found + len(markers.end), limit)
        turns.append(Turn(start if markers.max_tokens is None else max(start, end - markers.max_tokens), end))
    return turns


def turn_digests(tokens: Sequence[int], turns: Sequence[Turn], salt: str = "") -> list[str]:
    """A SHA-256 (hex) for each turn, of everything but the adapter that the turn's vectors depend on.

    The digest of turn i covers all tokens up to the end of its instruction, and the positions of instructions 0 to i.

    Args:
        tokens: token ids of the prompt
        turns: its turns
        salt: a client's cache salt; different salts give different digests
    """
    described = salt.encode()
    digest, covered, digests = hashlib.sha256(array("q", [len(described)]).tobytes() + described), 0, []
    for turn in turns:
        # The salt's length and each turn's end fix the number of bytes that follow. So different prompts, turns or
        # salts give different bytes.
        digest.update(array("q", [*turn, *tokens[covered : turn.end]]).tobytes())
        covered = turn.end
        digests.append(digest.copy().hexdigest())
    return digests


def _occurrences(tokens: Sequence[int], wanted: tuple[int, ...], position: int, limit: int) -> Iterator[int]:
    """Positions of `wanted` in tokens [position, limit), without overlaps."""
    while True:
        try:
            position = tokens.index(wanted[0], position, limit)
        except ValueError:
            return
        if tuple(tokens[position : position + len(wanted)]) == wanted:
            yield position
            position += len(wanted)
        else:
            position += 1
