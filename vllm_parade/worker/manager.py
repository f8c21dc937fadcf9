# SPDX-License-Identifier: Apache-2.0
"""The worker's PARADE manager, the counterpart of vLLM's LoRA manager: adapters, vector tables and step metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_parade.adapter import AdapterError, BaseModelShape, load_adapter
from vllm_parade.config import ServingConfig
from vllm_parade.layers import BatchMetadata, adjust_model
from vllm_parade.ops import use_kernels
from vllm_parade.ops.job import GeneratorJob
from vllm_parade.request import IDENTITY_ROW, StepPlan
from vllm_parade.worker.slots import AdapterSlots

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.parade.manager")


class ParadeManager:
    """Holds the adapters, vector tables and step metadata of one worker. Independent of the model runner."""

    def __init__(self, vllm_config: "VllmConfig", model: nn.Module, device: torch.device) -> None:
        self.config = ServingConfig.from_vllm_config(vllm_config)
        self.shape = BaseModelShape.from_hf_config(vllm_config.model_config.hf_text_config)
        scheduler, dtype = vllm_config.scheduler_config, vllm_config.model_config.dtype
        max_rank, kernels = self.config.max_parade_rank, use_kernels(device.type)
        self.batch = BatchMetadata.make(
            scheduler.max_num_batched_tokens, scheduler.max_num_seqs, max_rank, device, kernels=kernels
        )
        layers = adjust_model(
            model,
            sites=self.config.sites,
            num_rows=self.config.num_rows(scheduler.max_num_seqs),
            batch=self.batch,
            forward_context=vllm_config.compilation_config.static_forward_context,
            device=device,
            dtype=dtype,
        )
        self.slots = AdapterSlots(self.config.max_parades, layers, self.shape, max_rank, device, dtype)
        for local_idx, layer in enumerate(layers):
            layer.bind(self.slots.flat, local_idx)
        if kernels:
            layers[0].warm_up(self.shape.hidden_size)

    def add_adapter(self, path: str) -> dict[str, Any]:
        """Read an adapter into host memory.

        Returns:
            {"ok": True, "content_hash": ..., "turn_markers": ...} or {"ok": False, "error": ...}. An exception on one
            rank would leave the replies of the others unread.
        """
        try:
            adapter = load_adapter(path, self.shape, max_rank=self.config.max_parade_rank, sites=self.config.sites)
            self.slots.add(adapter)
        except AdapterError as error:
            return {"ok": False, "error": str(error)}
        except Exception as error:
            logger.exception("Loading the adapter in %s failed", path)
            return {"ok": False, "error": f"{path}: {type(error).__name__}: {error}"}
        markers = adapter.config.turn_markers
        return {"ok": True, "content_hash": adapter.content_hash, "turn_markers": markers and astuple(markers)}

    def forget_adapters(self, content_hashes: Sequence[str]) -> None:
        """Free the host memory of adapters. Adapters that this worker does not hold are ignored."""
        for content_hash in content_hashes:
            self.slots.remove(content_hash)

    def prepare(self, plan: StepPlan, request_ids: Sequence[str], num_tokens: Mapping[str, int]) -> None:
        """Fill the batch metadata for a step.

        Args:
            plan: the scheduler's plan of the step
            request_ids: requests in batch order
            num_tokens: scheduled tokens of each request, by request id
        """
        self.slots.activate(plan.slots)
        rows = [plan.rows.get(request_id, IDENTITY_ROW) for request_id in request_ids]
        tokens = [num_tokens[request_id] for request_id in request_ids]
        # Most steps only decode.
        jobs = self._jobs(plan, request_ids, tokens) if plan.readings else []
        if plan.borders:
            rows, tokens = _split_at_borders(plan, request_ids, rows, tokens)
        self.batch.prepare(rows, tokens, jobs)
        self.slots.prefetch(plan.upcoming)

    def _jobs(self, plan: StepPlan, request_ids: Sequence[str], tokens: Sequence[int]) -> list[GeneratorJob]:
        jobs = []
        for request_id, start in zip(request_ids, accumulate(tokens, initial=0), strict=False):
            reading = plan.readings.get(request_id)
            if reading is not None:
                adapter = reading.instruction.adapter
                first, layout = start + reading.offset, self.slots.host[adapter].layout
                jobs.append(GeneratorJob(reading.row, first, reading.instruction.tokens, plan.slots[adapter], layout))
        return jobs


def _split_at_borders(
    plan: StepPlan, request_ids: Sequence[str], rows: list[int], tokens: list[int]
) -> tuple[list[int], list[int]]:
    """Rows and numbers of tokens with two entries for a request whose tokens belong to two turns."""
    split_rows, split_tokens = [], []
    for request_id, row, count in zip(request_ids, rows, tokens, strict=True):
        before, second_row = plan.borders.get(request_id, (count, IDENTITY_ROW))
        split_rows += [row, second_row]
        split_tokens += [before, count - before]
    return split_rows, split_tokens
