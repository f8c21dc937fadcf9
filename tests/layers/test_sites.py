# SPDX-License-Identifier: Apache-2.0
"""The shards of each tensor parallel rank, compared with the whole model's vector."""

from types import SimpleNamespace

import pytest
import torch

from vllm_parade.adapter import SITES, AdapterConfig, BaseModelShape, initial_generator
from vllm_parade.layers.sites import gate_up_shards, qkv_shards, shard_generator
from vllm_parade.ops import reference

HEAD, HEADS, INTERMEDIATE, HIDDEN = 4, 8, 24, 16


def model_shape(kv_heads):
    widths = {"q": HEADS * HEAD, "k": kv_heads * HEAD, "v": kv_heads * HEAD, "gate": INTERMEDIATE, "up": INTERMEDIATE}
    return BaseModelShape(hidden_size=HIDDEN, num_layers=1, widths=widths)


def rank_shards(rank, ranks, kv_heads):
    """Shards from the attributes of vLLM's QKVParallelLinear and MergedColumnParallelLinear."""
    qkv = SimpleNamespace(
        num_heads=HEADS // ranks,
        num_kv_heads=max(kv_heads // ranks, 1),
        num_kv_head_replicas=max(ranks // kv_heads, 1),
        head_size=HEAD,
        v_head_size=HEAD,
        tp_rank=rank,
        tp_size=ranks,
    )
    gate_up = SimpleNamespace(output_sizes=[INTERMEDIATE, INTERMEDIATE], tp_rank=rank, tp_size=ranks)
    return [*qkv_shards(qkv), *gate_up_shards(gate_up)]


def spans(shards):
    """Entries of a site's whole-model vector that one shard holds."""
    return list(range(shards.model_start, shards.model_start + shards.width))


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
class TestShards:
    def test_all_ranks_together_hold_every_entry(self, ranks, kv_heads):
        widths = model_shape(kv_heads).widths
        copies = max(ranks // kv_heads, 1)
        for number, site in enumerate(SITES):
            held = [entry for rank in range(ranks) for entry in spans(rank_shards(rank, ranks, kv_heads)[number])]
            expected_copies = copies if site in ("k", "v") else 1
            assert sorted(held) == sorted(list(range(widths[site])) * expected_copies)

    @pytest.mark.parametrize("sites", [("q", "v", "up"), SITES, ("k", "gate")], ids="".join)
    @pytest.mark.parametrize("pooler", reference.POOLERS)
    def test_rows_of_all_ranks_are_the_whole_models_vector(self, ranks, kv_heads, sites, pooler):
        config, shape = AdapterConfig(sites=sites, pooler=pooler), model_shape(kv_heads)
        weights = strong_generator(config, shape)
        vector = generate(config, weights)
        whole = dict(zip(sites, vector.split([shape.widths[site] for site in sites], dim=1), strict=True))
        for rank in range(ranks):
            shards = rank_shards(rank, ranks, kv_heads)
            row = generate(config, shard_generator(weights, config, shape, shards, torch.float32))
            parts = row.split([shard.width for shard in shards], dim=1)
            for shard, part in zip(shards, parts, strict=True):
                if shard.name in sites:
                    torch.testing.assert_close(part, whole[shard.name][:, spans(shard)])
                else:
                    assert torch.equal(part, torch.ones_like(part))


def test_queries_that_share_a_kv_head_share_its_vector():
    """4 ranks, 2 KV heads: ranks 0 and 1 hold head 0, ranks 2 and 3 head 1."""
    starts = [rank_shards(rank, 4, 2)[2].model_start for rank in range(4)]
    assert starts == [0, 0, HEAD, HEAD]


def test_a_value_head_may_have_another_size():
    qkv = SimpleNamespace(num_heads=2, num_kv_heads=1, num_kv_head_replicas=1, head_size=6, v_head_size=4, tp_rank=1)
    q, k, v = qkv_shards(qkv)
    assert [(shard.width, shard.model_start) for shard in (q, k, v)] == [(12, 12), (6, 6), (4, 4)]


def test_a_shard_is_a_copy_in_the_models_dtype():
    config, shape = AdapterConfig(), model_shape(2)
    weights = strong_generator(config, shape)
    local = shard_generator(weights, config, shape, rank_shards(0, 2, 2), torch.bfloat16)
    assert {tensor.dtype for tensor in local.named_tensors().values()} == {torch.bfloat16}
    assert local.up.shape == (HEADS * HEAD // 2 + 2 * HEAD + INTERMEDIATE, config.r)


def strong_generator(config, shape):
    random = torch.Generator().manual_seed(0)
    weights = initial_generator(config, shape, random)
    for name, tensor in weights.named_tensors().items():
        if name != "up.bias":
            tensor.normal_(0, 0.3, generator=random)
    return weights


def generate(config, weights):
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return reference.generate(
        hidden,
        mask,
        down=weights.down,
        query=weights.query,
        weight=weights.weight,
        up=weights.up,
        bias=weights.bias,
        pooler=config.pooler,
        activation=config.activation,
    )
