# SPDX-License-Identifier: Apache-2.0
"""Adds PARADE to a loaded model, with forward hooks on three modules of every decoder layer.

Hooks are registered on instances, so a draft model of the same class is not affected. Parameter names do not change,
so weights can be loaded again. Scaling is plain PyTorch, which the compiler fuses with the next operations (rotary
embedding, SiLU and multiplication).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vllm_parade.layers.batch import BatchMetadata
from vllm_parade.layers.generator import LAYERS_KEY, ParadeLayer
from vllm_parade.layers.sites import SiteShard, gate_up_shards, qkv_shards


class UnsupportedModelError(ValueError):
    """The model lacks the modules that PARADE scales."""


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each decoder layer on this worker."""
    module: Any
    for name, module in model.named_modules():
        if all(hasattr(module, child) for child in ("input_layernorm", "self_attn", "mlp")):
            for parent, child in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
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
    """Add a vector table, a generator and scaled projections to every decoder layer.

    Args:
        sites: projections to scale, in the order of the table's columns
        forward_context: vLLM's map from names to layers, in which the generator op looks up its layer
    """
    layers: list[ParadeLayer] = []
    for name, module in decoder_layers(model):
        qkv, gate_up = module.self_attn.qkv_proj, module.mlp.gate_up_proj
        shards = {shard.name: shard for shard in (*qkv_shards(qkv), *gate_up_shards(gate_up))}
        layer_idx = int(name.rsplit(".", 1)[-1])
        layer = ParadeLayer(layer_idx, [shards[site] for site in sites], num_rows, batch, device, dtype)
        _hook_norm(module.input_layernorm, layer)
        _hook_projection(qkv, qkv_shards(qkv), layer, _scale_parts)
        _hook_projection(gate_up, gate_up_shards(gate_up), layer, _scale_output)
        layers.append(layer)
    if not layers:
        raise UnsupportedModelError("this worker has no decoder layer with input_layernorm, self_attn and mlp")
    forward_context[LAYERS_KEY] = {layer.table.data_ptr(): layer for layer in layers}
    return layers


def _hook_norm(norm: Any, layer: ParadeLayer) -> None:
    norm.register_buffer("parade_table", layer.table, persistent=False)
    norm.register_forward_hook(_generate_vectors)


def _generate_vectors(norm: Any, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    # The fused add-norm also returns the residual stream, even in the first layer of a later pipeline stage. The input
    # of the model's first norm is the residual stream.
    attention_input, layer_input = output if isinstance(output, tuple) else (output, args[0])
    torch.ops.vllm.parade_generate(layer_input, attention_input, norm.parade_table)


def _hook_projection(projection: Any, shards: list[SiteShard], layer: ParadeLayer, hook: Callable[..., Any]) -> None:
    """`shards` are the parts of the projection's output, in order."""
    ends = accumulate(shard.width for shard in layer.shards)
    columns = {shard.name: end - shard.width for shard, end in zip(layer.shards, ends, strict=True)}
    if any(shard.name in columns for shard in shards):
        projection.parade_parts = tuple((shard.width, columns.get(shard.name)) for shard in shards)
        projection.register_buffer("parade_table", layer.table, persistent=False)
        projection.register_buffer("parade_token_rows", layer.batch.token_rows, persistent=False)
        projection.register_forward_hook(hook)


def _vectors(projection: Any, num_tokens: int) -> Iterator[tuple[int, Tensor | None]]:
    """Width of each part of a projection's output, and its vector per token [tokens, width]; None if not scaled."""
    rows: Tensor = projection.parade_token_rows[:num_tokens]
    for width, column in projection.parade_parts:
        # Rows are valid by construction. Checking each index would put a barrier between the loads of a fused kernel.
        part = None if column is None else projection.parade_table[:, column : column + width]
        yield width, None if part is None else torch.ops.aten._unsafe_index.Tensor(part, [rows])


class ScaledParts:
    """The output of a fused projection, for a layer that only splits it. `split` returns scaled parts.

    With scaling in place, the compiler would repeat the scaling wherever any part is read. It would also copy all
    parts, because attention uses some of them as views of the output.
    """

    def __init__(self, output: Tensor, vectors: Sequence[tuple[int, Tensor | None]]) -> None:
        self.output, self.vectors = output, vectors

    def split(self, sizes: Sequence[int], dim: int = -1) -> tuple[Tensor, ...]:
        """Like `torch.Tensor.split`, for the sizes of the projection's parts.

        Semantics: Q' = l_q * Q, V' = l_v * V; likewise K, if k is a site  (4)
        """
        assert list(sizes) == [width for width, _ in self.vectors], f"split into {sizes}; expected the parts' widths"
        parts = self.output.split(sizes, dim)
        return tuple(
            part if vector is None else part * vector for part, (_, vector) in zip(parts, self.vectors, strict=True)
        )


def _scale_parts(projection: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[ScaledParts, Any]:
    result, bias = output
    return ScaledParts(result, tuple(_vectors(projection, len(result)))), bias


def _scale_output(projection: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
    """Scale in place, before the activation: vLLM bypasses the activation's module if it quantises the next layer.

    Semantics: U' = l_u * U; likewise the gate, if gate is a site  (5)
    """
    result, start = output[0], 0
    for width, vector in _vectors(projection, len(result)):
        if vector is not None:
            result[:, start : start + width].mul_(vector)
        start += width
