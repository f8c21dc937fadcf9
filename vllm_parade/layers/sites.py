# SPDX-License-Identifier: Apache-2.0
"""Position of each site in a projection's output, in the vector table and in the whole model's vector."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_parade.adapter import AdapterConfig, BaseModelShape, GeneratorWeights


@dataclass(frozen=True)
class SiteShard:
    """The part of one site that this rank of the tensor parallel group computes."""

    name: str
    """q, k, v, gate or up."""
    width: int
    """Entries on this rank."""
    model_start: int
    """First entry within the site's vector of the whole model."""


def qkv_shards(projection: Any) -> list[SiteShard]:
    """Sites of a QKVParallelLinear in the order of its output, [q | k | v] of this rank's heads."""
    query = projection.num_heads * projection.head_size
    key = projection.num_kv_heads * projection.head_size
    value = projection.num_kv_heads * projection.v_head_size
    # With fewer KV heads than ranks, neighbouring ranks hold copies of the same head.
    kv_rank = projection.tp_rank // projection.num_kv_head_replicas
    return [
        SiteShard("q", query, projection.tp_rank * query),
        SiteShard("k", key, kv_rank * key),
        SiteShard("v", value, kv_rank * value),
    ]


def gate_up_shards(projection: Any) -> list[SiteShard]:
    """Sites of a MergedColumnParallelLinear in the order of its output, [gate | up] of this rank's columns."""
    gate, up = (size // projection.tp_size for size in projection.output_sizes)
    return [
        SiteShard("gate", gate, projection.tp_rank * gate),
        SiteShard("up", up, projection.tp_rank * up),
    ]


def shard_generator(
    weights: GeneratorWeights,
    config: AdapterConfig,
    shape: BaseModelShape,
    shards: list[SiteShard],
    dtype: torch.dtype,
) -> GeneratorWeights:
    """This rank's part of a generator, in the model's dtype. It writes all columns of the table.

    The down projection and the pooler are the same on all ranks. The up projection has only the rows for this rank's
    columns, so ranks exchange no results. Sites that the adapter does not scale get weight 0 and bias 1.
    """
    starts, start = {}, 0
    for site in config.sites:
        starts[site], start = start, start + shape.widths[site]
    up, bias = [], []
    for shard in shards:
        if shard.name in starts:
            begin = starts[shard.name] + shard.model_start
            up.append(weights.up[begin : begin + shard.width])
            bias.append(weights.bias[begin : begin + shard.width])
        else:
            up.append(weights.up.new_zeros(shard.width, config.r))
            bias.append(weights.bias.new_ones(shard.width))
    local = GeneratorWeights(weights.down, weights.query, weights.weight, torch.cat(up), torch.cat(bias))
    return local.to(weights.up.device, dtype)
