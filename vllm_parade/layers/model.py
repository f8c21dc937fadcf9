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
            if not hasattr(module.self_attn, "qkv_proj") or not hasattr(module.mlp, "gate_up_proj"):
                raise UnsupportedModelError(f"layer {name} has no fused qkv_proj and gate_up_proj")
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
        _hook_projection(qkv, ("q", "k", "v"), layer)
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
    spans, column = [], 0
    for shard in layer.shards:
        if shard.name in names:
            spans.append(_span(shard, column))
        column += shard.width
    if spans:
        projection.parade_spans = tuple(spans)
        projection.register_buffer("parade_table", layer.table, persistent=False)
        projection.register_buffer("parade_token_rows", layer.batch.token_rows, persistent=False)
        projection.register_forward_hook(_scale_output)


def _span(shard: SiteShard, column: int) -> tuple[int, int, int]:
    return shard.output_start, column, shard.width


def _scale_output(projection: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
    """Semantics: Q' = l_q * Q, V' = l_v * V, U' = l_u * U, every token by its own row of the table  (4), (5)."""
    result = output[0]
    rows = projection.parade_token_rows[: result.shape[0]]
    for start, column, width in projection.parade_spans:
        vectors = projection.parade_table[:, column : column + width].index_select(0, rows)
        result[:, start : start + width].mul_(vectors)
