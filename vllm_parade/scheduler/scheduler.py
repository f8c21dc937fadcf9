# SPDX-License-Identifier: Apache-2.0
"""PARADE's extension of vLLM's scheduler.

Vectors are generated layer by layer in the forward pass of the instruction, and need the whole instruction. If no row
holds an instruction's vectors, one step computes the whole instruction, and a prefix-cache hit counts only up to the
start of its turn. Everything else is scheduled as in vLLM: base requests, tokens before the first turn, and turns whose
row is cached.

vLLM decides the order of requests (arrival or priority). An adapter holds a slot for one step; a request holds the row
of the turn that it computes. vLLM schedules running requests before waiting ones, so a long instruction could starve.
After PATIENCE steps without room for an instruction, running requests leave its tokens free in one step.
"""

from collections.abc import Collection
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from vllm_parade.config import ServingConfig, drafting_slots, step_tokens
from vllm_parade.request import PLAN_ATTRIBUTE, Conversation, Instruction, InstructionKey, StepPlan
from vllm_parade.scheduler.assignment import ScheduledTokens, assign_rows
from vllm_parade.scheduler.block_keys import conversation_of
from vllm_parade.scheduler.chunks import next_chunk
from vllm_parade.scheduler.rows import RowCache
from vllm_parade.scheduler.slots import SlotCache
from vllm_parade.scheduler.starvation import StarvationGuard
from vllm_parade.stats import RowCounts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as Base
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request
else:
    Base = object


class ParadeSchedulerMixin(Base):
    """Mixin for vLLM's schedulers. Owns the vector rows and the adapter slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = ServingConfig.from_vllm_config(self.vllm_config)
        self.rows = RowCache(config.num_rows(self.scheduler_config.max_num_seqs))
        self.slots = SlotCache(config.max_parades)
        # A step admits adapters without a slot only until it uses half of the slots. The other half is filled for later
        # steps while this step runs. So with many new adapters, only the first step waits for copies.
        self.max_cold_adapters_per_step = max(1, config.max_parades // 2)
        self.step_adapters: set[str] = set()
        # By instruction, the last request that may read it in this step. It does so only if vLLM schedules the request.
        self.step_readers: dict[InstructionKey, Request] = {}
        # Turn number and key of the instructions that requests running in this step read next, in later steps.
        self.step_ahead: list[tuple[int, InstructionKey]] = []
        # Rows that this step may give to requests that already hold one.
        self.spare_rows = 0
        # Rows of running requests that compute their last turn.
        self.settled: dict[str, int] = {}
        self.guard = StarvationGuard(drafting_slots(self.vllm_config))
        # Prompt tokens before a first turn that were found in the prefix cache.
        self.shared_base_tokens = 0

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        """Plan a step. The adapters that read instructions in it must fit into the slots together."""
        self.step_adapters.clear()
        self.step_readers.clear()
        self.step_ahead.clear()
        # One row is reserved for each request that holds none.
        self.spare_rows = self.rows.available - (self.max_num_running_reqs - self.rows.num_holders)
        self.guard.begin(self._share_of_running())
        output = super().schedule(*args, **kwargs)
        self.guard.end(self.waiting.peek_request() if self.waiting and self._is_full(output) else None)
        return output

    def _share_of_running(self) -> int | None:
        """Tokens of the next step that other running requests may take; None if no instruction waits too long."""
        request = self.guard.request
        if request is None or not self.guard.waits_too_long() or (conversation := conversation_of(request)) is None:
            return None
        position = request.num_computed_tokens
        if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            if not self._admits_requests():
                return None
            found = self.kv_cache_manager.get_computed_blocks(request)
            _, position = self._with_vectors(request, conversation, *found[:2])
        elif request.status != RequestStatus.RUNNING:
            return None
        turn = conversation.turn_at(position)
        unread = self._unread_tokens(request, conversation.instructions[turn]) if turn >= 0 else 0
        return step_tokens(self.vllm_config) - unread if unread else None

    def _admits_requests(self) -> bool:
        """Whether vLLM admits waiting requests in the next step. These are vLLM's own two conditions."""
        num_running = len(self.running) + self.num_waiting_for_streaming_input
        return self.pause_state == PauseState.UNPAUSED and num_running < self.max_num_active_reqs

    def _is_full(self, output: "SchedulerOutput") -> bool:
        """Whether a step has no tokens left to schedule, or the model's input has no room left."""
        tokens = output.total_num_scheduled_tokens
        inputs = tokens + self.guard.drafting * len(output.num_scheduled_tokens)
        room = self.scheduler_config.max_num_batched_tokens - inputs
        return tokens >= self.max_num_scheduled_tokens or room <= self.guard.drafting

    def _has_vectors(self, request: "Request", instruction: Instruction) -> bool:
        """Whether a row holds an instruction's vectors, or will when the request's next tokens are computed."""
        if instruction.key in self.rows or self.rows.holds(request.request_id, instruction.key):
            return True
        # vLLM may preempt a running request that it has just scheduled, but not once it schedules waiting ones.
        reader = self.step_readers.get(instruction.key)
        return request.status != RequestStatus.RUNNING and reader is not None and reader.status == RequestStatus.RUNNING

    def _unread_tokens(self, request: "Request", instruction: Instruction) -> int:
        """Tokens of an instruction that must be read; 0 if its vectors exist."""
        return 0 if self._has_vectors(request, instruction) else instruction.tokens

    def _handle_blocked_waiting_request(self, request: "Request", *args: Any, **kwargs: Any) -> bool:
        ready = super()._handle_blocked_waiting_request(request, *args, **kwargs)
        return ready and not self._is_read_by_another(request)

    def _is_read_by_another(self, request: "Request") -> bool:
        """Whether a running request is about to read an instruction that this one needs too.

        Such a request waits. vLLM looks up the prefix cache only when it admits a request, so a request that is
        admitted now would compute every later turn itself.
        """
        if not self.step_ahead or (conversation := conversation_of(request)) is None:
            return False
        instructions = conversation.instructions
        return any(turn < len(instructions) and instructions[turn].key == key for turn, key in self.step_ahead)

    def _get_local_prefix_cache_hit(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        found = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        conversation = conversation_of(request)
        if conversation is None:
            return found
        blocks, position, *more = found
        return *self._with_vectors(request, conversation, blocks, position), *more

    def _with_vectors(
        self, request: "Request", conversation: Conversation, blocks: Any, position: int
    ) -> tuple[Any, int]:
        """The longest part of a prefix hit after which the request can continue.

        The next tokens of a turn need its vectors. If no row holds them, the hit is cut to the turn's start, because
        the instruction must be computed again. The shorter hit may end inside the previous turn.
        """
        manager = self.kv_cache_manager
        while (turn := conversation.turn_at(position)) >= 0 and position > conversation.starts[turn]:
            if self._has_vectors(request, conversation.instructions[turn]):
                break
            if conversation.starts[turn] == 0:
                return manager.empty_kv_cache_blocks, 0
            hit = manager.coordinator.find_longest_cache_hit(request.block_hashes, conversation.starts[turn])
            blocks, position = manager.create_kv_cache_blocks(hit[0]), hit[1]
        return blocks, position

    def _reserve_prefill_lookahead(self, request: "Request", num_computed_tokens: int, num_new_tokens: int) -> int:
        limited = self.guard.limits(request, running=request.status == RequestStatus.RUNNING)
        if limited:
            num_new_tokens = self.guard.limit(num_new_tokens)
        conversation = conversation_of(request)
        if conversation is not None and request.request_id not in self.settled:
            num_new_tokens = self._within_turns(request, conversation, num_computed_tokens, num_new_tokens)
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if limited:
            self.guard.take(num_new_tokens)
        return num_new_tokens

    def _within_turns(self, request: "Request", conversation: Conversation, position: int, offered: int) -> int:
        chunk = next_chunk(
            conversation,
            position,
            offered,
            partial(self._has_vectors, request),
            can_read=self._can_generate(conversation.adapter),
            can_cross=self.spare_rows > 0,
        )
        end, turn = position + chunk.tokens, conversation.turn_at(position)
        if turn >= 0 and end > conversation.start_of(turn + 1):
            self.spare_rows -= 1
        if chunk.reading is not None:
            self.step_adapters.add(conversation.adapter)
            self.step_readers[chunk.reading.key] = request
            self.guard.found_room(request)
        elif (
            chunk.tokens == 0 and turn >= 0 and offered < self._unread_tokens(request, conversation.instructions[turn])
        ):
            self.guard.found_no_room(request)
        if chunk.tokens or request.status == RequestStatus.RUNNING:
            self._note_ahead(request, conversation, end)
        return chunk.tokens

    def _note_ahead(self, request: "Request", conversation: Conversation, end: int) -> None:
        """Note the next instruction of a running request, if its vectors do not exist."""
        turn = conversation.turn_at(end - 1) + 1 if end else 0
        if turn < len(conversation.instructions):
            instruction = conversation.instructions[turn]
            if not self._has_vectors(request, instruction):
                self.step_ahead.append((turn, instruction.key))

    def _can_generate(self, adapter: str) -> bool:
        if adapter in self.step_adapters:
            return True
        is_cold = adapter not in self.slots
        return len(self.step_adapters) < (self.max_cold_adapters_per_step if is_cold else self.slots.num_slots)

    def _update_after_schedule(self, scheduler_output: "SchedulerOutput") -> None:
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            conversation = conversation_of(request)
            if conversation is not None and not request.num_preemptions:
                self.shared_base_tokens += min(new.num_computed_tokens, conversation.starts[0])
        setattr(scheduler_output, PLAN_ATTRIBUTE, self._plan(scheduler_output.num_scheduled_tokens))
        super()._update_after_schedule(scheduler_output)

    def _plan(self, scheduled: dict[str, int]) -> StepPlan:
        settled: dict[str, int] = {}
        others: list[ScheduledTokens] = []
        for name, tokens in scheduled.items():
            # Most requests decode, and their row no longer changes.
            row = self.settled.get(name)
            if row is not None:
                settled[name] = row
            elif (conversation := conversation_of(request := self.requests[name])) is not None:
                others.append(ScheduledTokens(name, conversation, request.num_computed_tokens, tokens))
        rows, readings, borders = assign_rows(self.rows, others)
        for request in others:
            last = request.conversation.instructions[-1]
            if self.rows.holds(request.request_id, last.key):
                self.settled[request.request_id] = self.rows.row(request.request_id, last.key)
        adapters = dict.fromkeys(reading.instruction.adapter for reading in readings.values())
        slots = self.slots.activate(adapters)
        # Workers skip a step without tokens, and copy no adapters in it.
        upcoming = self.slots.activate(self._upcoming(adapters)) if scheduled else {}
        return StepPlan({**settled, **rows}, readings, borders, slots, upcoming)

    def _upcoming(self, adapters: Collection[str]) -> Collection[str]:
        """Adapters of the next waiting instructions, for the slots that this step does not use."""
        upcoming: dict[str, None] = {}
        for request in islice(self.waiting, self.max_num_running_reqs):
            if len(adapters) + len(upcoming) == self.slots.num_slots:
                break
            conversation = conversation_of(request)
            if conversation is None or conversation.adapter in adapters:
                continue
            if not self._has_vectors(request, conversation.instructions[-1]):
                upcoming[conversation.adapter] = None
        return upcoming

    def _preempt_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self._release_row(request)
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self._release_row(request)
        return super()._free_request(request, *args, **kwargs)

    def _release_row(self, request: "Request") -> None:
        self.settled.pop(request.request_id, None)
        self.rows.release(request.request_id)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Drop cached keys and values, and the cached vectors, which depend on the same weights."""
        done = super().reset_prefix_cache(*args, **kwargs)
        self.rows.forget()
        return done

    def make_stats(self, *args: Any, **kwargs: Any) -> "SchedulerStats | None":
        """A step's stats with the row counts. None if stats are disabled."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            RowCounts(self.rows.hits, self.rows.misses, self.rows.evictions, self.shared_base_tokens).put(stats)
        return stats
