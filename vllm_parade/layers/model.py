# SPDX-License-Identifier: Apache-2.0
"""The one loop that teaches a loaded model: forward hooks on three modules of every decoder layer.

Hooks sit on instances, so a draft model of the same class stays clean, and names of parameters do not change, so
weights can be loaded again. Scaling is plain PyTorch, which a compiler fuses with what follows (rotary embedding,
SiLU and multiplication).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vllm_parade.layers.batch import BatchMetadata
from vllm_parade.layers.generator import LAYERS_KEY, ParadeLayer
from vllm_parade.layers.sites import SiteShard, gate_up_shards, qkv_shards


class UnsupportedModelError(ValueError):
    """A model without the modules that PARADE adjusts."""


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Decoder layers that live on this worker, by name."""
    module: Any
    for name, module in model.named_modules():
        if all(hasattr(module, child) for child in ("input_layernorm", "self_attn", "mlp")):
            for parent, child in (("self_attn", "qkv_proj"), ("self_attn", "attn"), ("mlp", "gate_up_proj")):
                if not hasattr(getattr(module, parent), child):
                    raise UnsupportedModelError(f"layer {name} has no {parent}.{child}")
            yield name, module


def adjust_model(
    model: nn.Module,
    *,
    sites: tuple[str, ...],
    num_rows: int,
    batch: BatchMetadata,
    forward_context: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> list[ParadeLayer]:
    """Give every decoder layer a vector table, a generator and scaled projections.

    Args:
        sites: projections to scale, in the order of the table's columns
        forward_context: vLLM's map from names to layers, through which the generator op finds its layer
    """
    layers: list[ParadeLayer] = []
    for name, module in decoder_layers(model):
        qkv, gate_up = module.self_attn.qkv_proj, module.mlp.gate_up_proj
        shards = {shard.name: shard for shard in (*qkv_shards(qkv), *gate_up_shards(gate_up))}
        index = int(name.rsplit(".", 1)[-1])
        layer = ParadeLayer(index, [shards[site] for site in sites], num_rows, batch, device, dtype)
        _hook_norm(module.input_layernorm, layer)
        _hook_projection(qkv, ("q", "k"), layer)
        _hook_values(module.self_attn.attn, layer)
        _hook_projection(gate_up, ("gate", "up"), layer)
        layers.append(layer)
    if not layers:
        raise UnsupportedModelError("the model has no decoder layer with input_layernorm, self_attn and mlp")
    forward_context[LAYERS_KEY] = {layer.table.data_ptr(): layer for layer in layers}
    return layers


def _hook_norm(norm: Any, layer: ParadeLayer) -> None:
    norm.register_buffer("parade_table", layer.table, persistent=False)
    norm.register_forward_hook(_generate_vectors)


def _generate_vectors(norm: Any, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    # The fused add-norm returns the residual stream beside its output; the model's first norm gets it as its input.
    attention_input, layer_input = output if isinstance(output, tuple) else (output, args[0])
    torch.ops.vllm.parade_generate(layer_input, attention_input, norm.parade_table)


def _hook_projection(projection: Any, names: tuple[str, ...], layer: ParadeLayer) -> None:
    spans = tuple((shard.output_start, column, shard.width) for shard, column in _columns(layer) if shard.name in names)
    if spans:
        projection.parade_spans = spans
        _register_tables(projection, layer)
        projection.register_forward_hook(_scale_output)


def _hook_values(attention: Any, layer: ParadeLayer) -> None:
    for shard, column in _columns(layer):
        if shard.name == "v":
            attention.parade_columns = slice(column, column + shard.width)
            _register_tables(attention, layer)
            attention.register_forward_pre_hook(_scale_values)


def _columns(layer: ParadeLayer) -> Iterator[tuple[SiteShard, int]]:
    """The layer's sites, with the first column of each in the table."""
    column = 0
    for shard in layer.shards:
        yield shard, column
        column += shard.width


def _register_tables(module: Any, layer: ParadeLayer) -> None:
    module.register_buffer("parade_table", layer.table, persistent=False)
    module.register_buffer("parade_token_rows", layer.batch.token_rows, persistent=False)


def _vectors(module: Any, columns: slice, num_tokens: int) -> Tensor:
    """[tokens, width]: every token's own row of the table."""
    rows: Tensor = module.parade_token_rows[:num_tokens]
    vectors: Tensor = module.parade_table[:, columns].index_select(0, rows)
    return vectors


def _scale_output(projection: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
    """Semantics: Q' = l_q * Q, U' = l_u * U; likewise K and the gate, where an adapter asks for it  (4), (5)."""
    result = output[0]
    for start, column, width in projection.parade_spans:
        vectors = _vectors(projection, slice(column, column + width), len(result))
        result[:, start : start + width].mul_(vectors)


def _scale_values(attention: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Semantics: V' = l_v * V  (4).

    Here and not in the projection's output, of which attention takes V as it lies: a compiler would copy all of it for
    the part that changes.
    """
    query, key, value, *others = args
    return query, key, value * _vectors(attention, attention.parade_columns, len(value)), *others
