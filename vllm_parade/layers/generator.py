# SPDX-License-Identifier: Apache-2.0
"""The vector table of one layer, and the custom op that writes its rows for the instructions of a step."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_parade.adapter import Adapter, AdapterConfig, AdapterError, BaseModelShape, GeneratorWeights
from vllm_parade.layers.batch import BatchMetadata
from vllm_parade.layers.sites import SiteShard, shard_generator
from vllm_parade.ops import reference
from vllm_parade.ops.job import GeneratorJob

# Key of all ParadeLayers in vLLM's forward context, where they are stored by the address of their table.
LAYERS_KEY = "parade_layers"


class ParadeLayer:
    """A decoder layer's vector table and generator."""

    def __init__(
        self,
        layer_idx: int,
        shards: list[SiteShard],
        num_rows: int,
        batch: BatchMetadata,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layer_idx = layer_idx
        """Index among the model's layers."""
        self.shards = shards
        self.batch = batch
        # Row 0 is never written and stays one, so scaling by it is exact.
        self.table = torch.ones(num_rows, sum(shard.width for shard in shards), device=device, dtype=dtype)
        self.flat: Tensor
        self.local_idx: int

    def bind(self, flat: Tensor, local_idx: int) -> None:
        """Set the slots that generators are read from.

        Args:
            flat: [slots, entries], packed generators
            local_idx: index among this worker's layers
        """
        self.flat, self.local_idx = flat, local_idx

    def shard(self, adapter: Adapter, shape: BaseModelShape) -> GeneratorWeights | None:
        """This rank's part of an adapter's generator, in host memory. None if the adapter has none for this layer.

        Raises:
            AdapterError: a weight overflows in the model's dtype.
        """
        weights = adapter.generators.get(self.layer_idx)
        if weights is None:
            return None
        local = shard_generator(weights, adapter.config, shape, self.shards, self.table.dtype)
        # Loading has checked that all weights are finite, so only a narrower dtype can overflow.
        narrower = torch.finfo(self.table.dtype).max < torch.finfo(weights.up.dtype).max
        for name, tensor in local.named_tensors().items() if narrower else ():
            if not tensor.isfinite().all():
                raise AdapterError(f"{adapter.path}: {name} of layer {self.layer_idx} overflows in {self.table.dtype}")
        return local

    def generate(self, layer_input: Tensor, attention_input: Tensor) -> None:
        """Write the rows of all instructions of this step.

        Args:
            layer_input: [tokens, hidden], the residual stream
            attention_input: [tokens, hidden], the same after the layer's first norm
        """
        if self.batch.workspace is None:
            self._run_reference(layer_input, attention_input)
        else:
            self._run_kernels(layer_input, attention_input, self.batch.workspace)

    def _run_kernels(self, layer_input: Tensor, attention_input: Tensor, workspace: Tensor) -> None:
        from vllm_parade.ops.generate import generate_rows

        generate_rows(
            layer_input,
            attention_input,
            self.table,
            self.flat,
            self.local_idx,
            self.batch.step,
            workspace,
            self.batch.max_rank,
        )

    def _run_reference(self, layer_input: Tensor, attention_input: Tensor) -> None:
        by_slot: dict[int, list[GeneratorJob]] = defaultdict(list)
        for job in self.batch.jobs:
            by_slot[job.slot].append(job)
        for slot, jobs in by_slot.items():
            rows = torch.tensor([job.row for job in jobs], device=self.table.device)
            layout = jobs[0].layout
            hidden = layer_input if layout.config.generator_input == "layer_input" else attention_input
            instructions = [hidden[job.start : job.start + job.length] for job in jobs]
            self.table[rows] = _generate(instructions, layout.views(self.flat[slot], self.local_idx), layout.config)

    def warm_up(self, hidden_size: int) -> None:
        """Compile the kernels, so that neither graph capture nor the first request compiles them."""
        from vllm_parade.ops.generate import warm_up_sizes

        for num_tokens in warm_up_sizes(len(self.batch.token_rows)):
            hidden = self.table.new_empty(num_tokens, hidden_size)
            self.generate(hidden, hidden)


def _generate(instructions: list[Tensor], weights: GeneratorWeights, config: AdapterConfig) -> Tensor:
    lengths = torch.tensor([len(hidden) for hidden in instructions], device=weights.down.device)
    hidden = pad_sequence(instructions, batch_first=True)
    mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return reference.generate(hidden, mask, **vars(weights), pooler=config.pooler, activation=config.activation)


def parade_generate(layer_input: Tensor, attention_input: Tensor, table: Tensor) -> None:
    """Custom op: write the rows of `table` for the instructions of this step.

    The op is opaque to the compiler, which sees only that the table changes. Without instructions, the op does nothing.
    So full graphs, which serve decode steps, contain no kernels. Piecewise graphs are captured with the kernels, and
    replayed for steps with and without instructions.

    The table's address identifies the layer. With a name instead, each layer would compile to different code.
    """
    context = get_forward_context()
    layer: ParadeLayer = context.no_compile_layers[LAYERS_KEY][table.data_ptr()]
    if layer.batch.jobs or context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
        layer.generate(layer_input, attention_input)


def _parade_generate_fake(layer_input: Tensor, attention_input: Tensor, table: Tensor) -> None:
    return


direct_register_custom_op(
    op_name="parade_generate",
    op_func=parade_generate,
    mutates_args=["table"],
    fake_impl=_parade_generate_fake,
)
