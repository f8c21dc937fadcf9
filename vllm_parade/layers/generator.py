# SPDX-License-Identifier: Apache-2.0
"""One layer's vector table, and the op that writes its rows while instructions pass through the layer."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_parade.adapter import Adapter, AdapterConfig, BaseModelShape, GeneratorWeights
from vllm_parade.layers.batch import BatchMetadata, GeneratorJob
from vllm_parade.layers.sites import SiteShard, shard_generator
from vllm_parade.ops import reference


@dataclass(frozen=True)
class LayerGenerator:
    """What a slot holds for one layer."""

    config: AdapterConfig
    weights: GeneratorWeights


class ParadeLayer:
    """A decoder layer's share of PARADE: its table and the generators that hold a slot."""

    def __init__(
        self,
        index: int,
        shards: list[SiteShard],
        num_rows: int,
        batch: BatchMetadata,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.index = index
        self.shards = shards
        self.batch = batch
        # Row 0 is never written, so that scaling by it is exact.
        self.table = torch.ones(num_rows, sum(shard.width for shard in shards), device=device, dtype=dtype)
        self.generators: dict[str, LayerGenerator | None] = {}

    def activate(self, adapter: Adapter, shape: BaseModelShape) -> None:
        """Copy this rank's part of an adapter's generator to the device."""
        weights = adapter.generators.get(self.index)
        if weights is None:
            self.generators[adapter.content_hash] = None
            return
        local = shard_generator(weights, adapter.config, shape, self.shards, self.table.device, self.table.dtype)
        self.generators[adapter.content_hash] = LayerGenerator(adapter.config, local)

    def deactivate(self, content_hash: str) -> None:
        """Forget an adapter's generator."""
        del self.generators[content_hash]

    def generate(self, layer_input: Tensor, attention_input: Tensor) -> None:
        """Write the rows of all instructions of this step.

        Args:
            layer_input: [tokens, hidden], the residual stream
            attention_input: [tokens, hidden], the same after the layer's first norm
        """
        by_adapter: dict[str, list[GeneratorJob]] = defaultdict(list)
        for job in self.batch.jobs:
            by_adapter[job.adapter].append(job)
        for adapter, jobs in by_adapter.items():
            rows = torch.tensor([job.row for job in jobs], device=self.table.device)
            generator = self.generators[adapter]
            if generator is None:
                self.table[rows] = 1
                continue
            reads_stream = generator.config.generator_input == "layer_input"
            hidden = layer_input if reads_stream else attention_input
            self.table[rows] = _generate(generator, [hidden[job.start : job.stop] for job in jobs])


def _generate(generator: LayerGenerator, instructions: list[Tensor]) -> Tensor:
    config, weights = generator.config, generator.weights
    lengths = torch.tensor([len(hidden) for hidden in instructions], device=weights.down.device)
    hidden = pad_sequence(instructions, batch_first=True)
    mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
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


def parade_generate(layer_input: Tensor, attention_input: Tensor, table: Tensor, layer_name: str) -> None:
    """Custom op: write the rows of `table` for the instructions of this step.

    Opaque to the compiler, which sees only that the table changes; a step without instructions returns at once.
    """
    layer: ParadeLayer = get_forward_context().no_compile_layers[layer_name]
    if layer.batch.jobs:
        layer.generate(layer_input, attention_input)


def _parade_generate_fake(layer_input: Tensor, attention_input: Tensor, table: Tensor, layer_name: str) -> None:
    return


direct_register_custom_op(
    op_name="parade_generate",
    op_func=parade_generate,
    mutates_args=["table"],
    fake_impl=_parade_generate_fake,
)
