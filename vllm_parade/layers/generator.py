# SPDX-License-Identifier: Apache-2.0
"""One layer's vector table, and the op that writes its rows while instructions pass through the layer."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_parade.adapter import Adapter, AdapterConfig, AdapterError, BaseModelShape, GeneratorWeights
from vllm_parade.layers.batch import BatchMetadata
from vllm_parade.layers.sites import SiteShard, shard_generator
from vllm_parade.ops import reference
from vllm_parade.ops.job import NUM_POINTERS, GeneratorJob, packed_generator


class ParadeLayer:
    """A decoder layer's share of PARADE: its table and the generators that hold a slot."""

    def __init__(
        self,
        index: int,
        shards: list[SiteShard],
        num_rows: int,
        num_slots: int,
        batch: BatchMetadata,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.index = index
        self.shards = shards
        self.batch = batch
        # Row 0 is never written, so that scaling by it is exact.
        self.table = torch.ones(num_rows, sum(shard.width for shard in shards), device=device, dtype=dtype)
        self.generators: list[GeneratorWeights | None] = [None] * num_slots
        self.packed: list[list[Tensor]] = [[] for _ in range(num_slots)]
        self.pointers: Tensor | None = None
        if batch.workspace is not None:
            self.pointers = torch.zeros(num_slots, NUM_POINTERS, dtype=torch.int64, device=device)

    def shard(self, adapter: Adapter, shape: BaseModelShape) -> GeneratorWeights | None:
        """This rank's part of an adapter's generator in host memory, ready to be copied; None if it has none.

        Raises:
            AdapterError: a weight that the model's dtype cannot hold.
        """
        weights = adapter.generators.get(self.index)
        if weights is None:
            return None
        local = shard_generator(weights, adapter.config, shape, self.shards, self.table.dtype)
        for name, tensor in local.named_tensors().items():
            if not tensor.isfinite().all():
                raise AdapterError(f"{adapter.path}: {name} of layer {self.index} overflows in {self.table.dtype}")
        return local.pinned() if self.table.is_cuda else local

    def activate(self, slot: int, weights: GeneratorWeights | None) -> None:
        """Copy what `shard` made to the device, into `slot`; the host does not wait for it."""
        if weights is not None:
            weights = weights.to(self.table.device, self.table.dtype)
        if self.pointers is None:
            self.generators[slot] = weights
            return
        # Kernels read through addresses. Those of the slot's last adapter stay allocated until the new ones stand, and
        # memory is reused in the order of the stream, so a step in flight still finds what it was planned with.
        tensors, addresses = ([], [0] * NUM_POINTERS) if weights is None else packed_generator(weights)
        self.pointers[slot].copy_(torch.tensor(addresses, dtype=torch.int64), non_blocking=True)
        self.packed[slot] = tensors

    def generate(self, layer_input: Tensor, attention_input: Tensor) -> None:
        """Write the rows of all instructions of this step.

        Args:
            layer_input: [tokens, hidden], the residual stream
            attention_input: [tokens, hidden], the same after the layer's first norm
        """
        if self.batch.step is not None:
            from vllm_parade.ops.generate import generate_rows

            assert self.pointers is not None
            assert self.batch.workspace is not None
            step, workspace = self.batch.step, self.batch.workspace
            generate_rows(layer_input, attention_input, self.table, self.pointers, step, workspace)
            return
        by_slot: dict[int, list[GeneratorJob]] = defaultdict(list)
        for job in self.batch.jobs:
            by_slot[job.slot].append(job)
        for slot, jobs in by_slot.items():
            rows = torch.tensor([job.row for job in jobs], device=self.table.device)
            weights, config = self.generators[slot], jobs[0].config
            if weights is None:
                self.table[rows] = 1
                continue
            hidden = layer_input if config.generator_input == "layer_input" else attention_input
            instructions = [hidden[job.start : job.start + job.length] for job in jobs]
            self.table[rows] = _generate(instructions, weights, config)


def _generate(instructions: list[Tensor], weights: GeneratorWeights, config: AdapterConfig) -> Tensor:
    lengths = torch.tensor([len(hidden) for hidden in instructions], device=weights.down.device)
    hidden = pad_sequence(instructions, batch_first=True)
    mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return reference.generate(hidden, mask, **vars(weights), pooler=config.pooler, activation=config.activation)


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
