# SPDX-License-Identifier: Apache-2.0
"""The turns of a batch: the tokens of each instruction, and the vectors that scale each token."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vllm_parade.adapter.turns import Turn, TurnMarkers, find_turns
from vllm_parade.tuner.attention import sequence_lengths

# Name of the turns as a keyword argument of the base model, and as an attribute of its KV cache.
ARGUMENT = "parade_turns"
# The row of ones, which scales tokens of the base model.
BASE_ROW = 0


@dataclass(frozen=True)
class Prompt:
    """The prompts of a `generate` call."""

    tokens: Tensor | None
    """[batch, tokens] ids; None if the call gives embeddings."""
    instruction_mask: Tensor | None

    def mask(self, width: int) -> Tensor | None:
        """The instruction mask of a pass over `width` tokens, 0 at generated ones. None without tokens and mask."""
        mask = self.instruction_mask
        if mask is None and self.tokens is not None:
            mask = torch.ones_like(self.tokens)
        return mask if mask is None else pad(mask, (0, width - mask.shape[1]))


@dataclass(frozen=True)
class BatchTurns:
    """The turns of a batch under one adapter, for one pass.

    Every decoder layer receives them as a keyword argument, so gradient checkpointing recomputes a layer with the same
    turns. They are stored on the KV cache for later passes.
    """

    adapter: str
    turns: tuple[tuple[Turn, ...], ...]
    """Turns of each sequence. Positions count from the sequence's first token, padding included."""
    token_rows: Tensor
    """[batch, tokens] int64, the table row that scales each token; [batch, 1] where one row scales a whole sequence."""
    last_rows: Tensor
    """[sequences, 1] int64, the table row of each sequence's last turn."""
    positions: Tensor | None = None
    """[instructions, longest] int64, positions in the flattened batch of the tokens that this pass reads, padded with
    -1; None if it reads none."""
    cached: dict[int, Tensor] = field(default_factory=dict)
    """Tables of earlier passes, by layer."""
    tables: dict[int, Tensor] = field(default_factory=dict)
    """Vectors by layer, [1 + turns, d_out]; the first row holds ones."""

    @classmethod
    def of_cache(cls, cache: Any, adapter: str) -> "BatchTurns":
        """The turns of the tokens in a KV cache.

        Raises:
            ValueError: the cache was filled without this adapter.
        """
        turns: BatchTurns | None = getattr(cache, ARGUMENT, None)
        if turns is None or turns.adapter != adapter:
            made = "without an adapter" if turns is None else f"under adapter {turns.adapter!r}"
            raise ValueError(f"the KV cache was filled {made}, and {adapter!r} is active; start with an empty one")
        return turns

    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the instructions, padded to [instructions, tokens, hidden], and their mask."""
        assert self.positions is not None
        positions = self.positions.to(hidden.device)
        read = hidden.flatten(0, 1).index_select(0, positions.clamp(min=0).flatten())
        return read.view(*positions.shape, -1), positions >= 0

    def write(self, layer_idx: int, vectors: Tensor) -> None:
        """Store the vectors that a layer generated, [instructions, d_out]."""
        known = self.cached.get(layer_idx)
        self.tables[layer_idx] = torch.cat([torch.ones_like(vectors[:1]) if known is None else known, vectors])

    def table(self, layer_idx: int) -> Tensor | None:
        """A layer's vectors, [1 + turns, d_out]; None if the layer has none."""
        return self.tables.get(layer_idx, self.cached.get(layer_idx))

    def last_vectors(self) -> dict[int, Tensor]:
        """By layer, the vectors of each sequence's last turn, [sequences, d_out]."""
        return {layer: table[self.last_rows[:, 0].to(table.device)] for layer, table in self._all_tables().items()}

    def later(self) -> "BatchTurns":
        """The turns for a later pass. All its tokens belong to the last turn of their sequence."""
        return BatchTurns(self.adapter, self.turns, self.last_rows, self.last_rows, cached=self._all_tables())

    def _all_tables(self) -> dict[int, Tensor]:
        return {**self.cached, **self.tables}


def batch_turns(
    adapter: str,
    markers: TurnMarkers | None,
    tokens: Tensor | None,
    prompts: Tensor,
    lengths: tuple[int, ...] | None = None,
    known: BatchTurns | None = None,
    cached_tokens: int = 0,
) -> BatchTurns:
    """Find the turns of a batch.

    Args:
        adapter: its name
        markers: how the adapter marks its instructions; None means that a whole prompt is one instruction
        tokens: [batch, tokens] ids; needed only with markers
        prompts: [batch, tokens] bool, True where turns are searched; False for padding and generated tokens
        lengths: number of tokens in each sequence of a packed batch; None where every row is a sequence
        known: the turns of the tokens in the KV cache
        cached_tokens: number of tokens in the KV cache; the pass computes the tokens after them

    Raises:
        ValueError: a sequence has no prompt token, the turns of the cached tokens have changed, or there are markers
            but no ids.
    """
    if markers is not None and tokens is None:
        raise ValueError("the adapter finds its turns by token ids; pass input_ids, not inputs_embeds")
    device, sizes = prompts.device, lengths or (prompts.shape[1],) * len(prompts)
    # Copied once: each read of a value on a GPU waits for the GPU.
    prompts, tokens = prompts.cpu(), None if tokens is None else tokens.cpu()
    areas = prompts.flatten().split(sizes)
    ids = areas if tokens is None else tokens.flatten().split(sizes)
    found: list[tuple[Turn, ...]] = []
    rows, last_rows, read = [], [], []
    num_rows, offset = 1 if known is None else 1 + sum(map(len, known.turns)), 0
    for number, (area, sequence, size) in enumerate(zip(areas, ids, sizes, strict=True)):
        positions = area.nonzero()[:, 0]
        if not len(positions):
            raise ValueError(
                "a row has no instruction token; every row needs at least one: a prompt before the first label, or a "
                "mask"
            )
        # Beam search repeats each prompt and its cache entries.
        origin = 0 if known is None else number // (len(sizes) // len(known.turns))
        cached = () if known is None else known.turns[origin]
        compact = find_turns(sequence[positions].tolist(), markers)
        turns = tuple(Turn(int(positions[turn.start]), int(positions[turn.end - 1]) + 1) for turn in compact)
        _check_cached(turns, cached, cached_tokens)
        row = torch.full((size,), BASE_ROW)
        if known is not None:
            row[:] = known.last_rows[origin].cpu()
        for turn, place in list(zip(turns, compact, strict=True))[len(cached) :]:
            row[0 if markers is None else turn.start :] = num_rows
            num_rows += 1
            read.append(positions[place.start : place.end] + offset - cached_tokens)
        found.append(turns)
        last_rows.append(row[-1:])
        rows.append(row[cached_tokens:])
        offset += size - cached_tokens
    last = torch.stack(last_rows).to(device)
    one_row = markers is None and lengths is None
    return BatchTurns(
        adapter,
        tuple(found),
        token_rows=last if one_row else torch.cat(rows).view(len(prompts), -1).to(device),
        last_rows=last,
        positions=pad_sequence(read, batch_first=True, padding_value=-1).to(device) if read else None,
        cached={} if known is None else known.later().cached,
    )


def continued_turns(
    markers: TurnMarkers | None,
    prompt: Prompt | None,
    known: BatchTurns,
    cached_tokens: int,
    shape: torch.Size,
    attention_mask: Tensor | None,
) -> BatchTurns:
    """The turns of a pass with a filled cache. Only the first pass of `generate` can have new ones.

    Args:
        markers: how the adapter marks its instructions
        prompt: the prompts of the `generate` call; None outside of one
        known: the turns of the tokens in the cache
        cached_tokens: number of tokens in the cache
        shape: [batch, tokens] of the pass
        attention_mask: [batch, cached tokens and tokens]
    """
    width = cached_tokens + shape[1]
    if markers is None or prompt is None or prompt.tokens is None or prompt.tokens.shape[1] != width:
        return known.later()
    tokens = prompt.tokens.repeat_interleave(shape[0] // len(prompt.tokens), dim=0)
    prompts = combined(tokens.shape, tokens.device, attention_mask, prompt.mask(width))
    return batch_turns(known.adapter, markers, tokens, prompts, known=known, cached_tokens=cached_tokens)


def _check_cached(turns: tuple[Turn, ...], cached: tuple[Turn, ...], cached_tokens: int) -> None:
    if turns[: len(cached)] == cached and all(turn.start >= cached_tokens for turn in turns[len(cached) :]):
        return
    raise ValueError(
        f"the KV cache holds {cached_tokens} tokens with turns {_listed(cached)}, but the prompt has turns "
        f"{_listed(turns)}; start with an empty cache"
    )


def _listed(turns: tuple[Turn, ...]) -> str:
    return ", ".join(f"[{turn.start}, {turn.end})" for turn in turns)


def check_labels(turns: BatchTurns, learnt: Tensor) -> None:
    """Refuse labels inside an instruction: the generators would read the answer.

    Args:
        learnt: [batch, tokens] bool, True where a token has a label

    Raises:
        ValueError: names the row and the token.
    """
    if turns.positions is None:
        return
    read = turns.positions[turns.positions >= 0]
    inside = read[learnt.flatten()[read]]
    if len(inside):
        row, token = divmod(int(inside[0]), learnt.shape[1])
        raise ValueError(
            f"row {row} has a label at token {token}, inside an instruction; generators must not read the answer: give "
            "instruction tokens the label -100"
        )


def packed_lengths(position_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[int, ...] | None:
    """Lengths of the sequences in a packed batch: one row without a mask, in which position ids restart."""
    if position_ids is None or attention_mask is not None or len(position_ids) != 1:
        return None
    lengths = sequence_lengths(position_ids)
    return tuple(lengths) if len(lengths) > 1 else None


def before_labels(labels: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
    """The positions of each sequence before its first label, [batch, tokens] bool.

    Args:
        labels: [batch, tokens], -100 where a token is not learnt
        lengths: lengths of packed sequences
    """
    if lengths is not None:
        return torch.cat([before_labels(part) for part in labels.split(lengths, dim=1)], dim=1)
    return (labels != -100).cumsum(dim=1) == 0


def combined(shape: torch.Size, device: torch.device, *masks: Tensor | None) -> Tensor:
    """The conjunction of the given masks, [batch, tokens] bool. A mask from before beam search repeats the prompts has
    fewer rows; each of its rows is repeated.

    Raises:
        ValueError: a mask has another shape.
    """
    positions = torch.ones(shape, dtype=torch.bool, device=device)
    for mask in masks:
        if mask is None:
            continue
        if mask.ndim != 2 or mask.shape[1] != shape[1] or not len(mask) or shape[0] % len(mask):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [batch, tokens], {tuple(shape)}")
        positions &= mask.to(device).bool().repeat_interleave(shape[0] // len(mask), dim=0)
    return positions
