# SPDX-License-Identifier: Apache-2.0
"""Mutations of the package, each with the tests that must catch it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change in one file."""

    name: str
    file: str
    before: str
    """Text that occurs exactly once in the file."""
    after: str
    tests: tuple[str, ...]
    """Arguments of pytest; at least one of these tests must fail."""


LAYERS, SCHEDULER, FRONTEND = "vllm_parade/layers", "vllm_parade/scheduler", "vllm_parade/frontend"
EXACT = ("tests/e2e/test_architectures.py", "-k", "Llama")
TURNS = ("tests/e2e/test_turns.py", "-k", "conversations")
MUTATIONS = (
    Mutation(
        "wrong row",
        "vllm_parade/worker/manager.py",
        "rows = [plan.rows.get(request_id, IDENTITY_ROW) for request_id in request_ids]",
        "rows = [max(plan.rows.values(), default=IDENTITY_ROW) for request_id in request_ids]",
        EXACT,
    ),
    Mutation(
        "skipped generator",
        f"{LAYERS}/generator.py",
        "    if layer.batch.jobs or context",
        "    if False and layer.batch.jobs or context",
        ("tests/layers/test_hooks.py",),
    ),
    Mutation(
        "instruction one token short",
        "vllm_parade/worker/manager.py",
        "GeneratorJob(reading.row, first, reading.instruction.tokens,",
        "GeneratorJob(reading.row, first, max(1, reading.instruction.tokens - 1),",
        EXACT,
    ),
    Mutation(
        "digest one token short",
        "vllm_parade/adapter/turns.py",
        "tokens[covered : turn.end]",
        "tokens[covered : turn.end - 1]",
        ("tests/adapter/test_turns.py",),
    ),
    Mutation(
        "second turn under the first one's row",
        "vllm_parade/worker/manager.py",
        "split_tokens += [before, count - before]",
        "split_tokens += [count, 0]",
        TURNS,
    ),
    Mutation(
        "generated start tokens open a turn",
        "vllm_parade/frontend/inputs.py",
        "        parade_request.instruction_tokens = tokens\n",
        "        pass\n",
        ("tests/frontend/test_inputs.py",),
    ),
    Mutation(
        "slot read although it holds another adapter",
        "vllm_parade/worker/slots.py",
        "new = {slot: self.host[name] for name, slot in slots.items() if self.contents[slot] != name}",
        "new = {slot: self.host[name] for name, slot in slots.items() if self.contents[slot] is None}",
        ("tests/worker/test_slots.py",),
    ),
    Mutation(
        "slot taken from an adapter of the same step",
        f"{SCHEDULER}/slots.py",
        "            if adapter in self._slots:\n                self._slots.move_to_end(adapter)",
        "            pass",
        ("tests/scheduler/test_slots.py",),
    ),
    Mutation(
        "stale row after a reset",
        f"{SCHEDULER}/scheduler.py",
        "        self.rows.forget()\n",
        "",
        ("tests/scheduler/test_steps.py", "-k", "reset"),
    ),
    Mutation(
        "row given back while its request runs",
        f"{SCHEDULER}/rows.py",
        "        if self._holders[row]:\n            return\n",
        "",
        ("tests/scheduler/test_rows.py", "tests/scheduler/test_shared_rows.py"),
    ),
    Mutation(
        "cached keys and values without their turn's vectors",
        f"{SCHEDULER}/scheduler.py",
        "if self._has_vectors(request, conversation.instructions[turn]):",
        "if True or self._has_vectors(request, conversation.instructions[turn]):",
        ("tests/scheduler/test_turns.py",),
    ),
    Mutation(
        "prefix shortened once only",
        f"{SCHEDULER}/scheduler.py",
        "blocks, position = manager.create_kv_cache_blocks(hit[0]), hit[1]",
        "return manager.create_kv_cache_blocks(hit[0]), hit[1]",
        ("tests/scheduler/test_turns.py",),
    ),
    Mutation(
        "instruction in parts",
        f"{SCHEDULER}/chunks.py",
        "position > reading.start or end < reading.end or not can_read",
        "position > reading.start or not can_read",
        ("tests/scheduler/test_steps.py",),
    ),
    Mutation(
        "two instructions in one step",
        f"{SCHEDULER}/chunks.py",
        "if reading is None and can_read",
        "if can_read",
        ("tests/scheduler/test_turns.py",),
    ),
    Mutation(
        "a second row although none is to spare",
        f"{SCHEDULER}/chunks.py",
        "if turn >= 0 and not can_cross:",
        "if False and not can_cross:",
        ("tests/scheduler/test_turns.py",),
    ),
    Mutation(
        "row given back before its step has run",
        f"{SCHEDULER}/assignment.py",
        "    for request, turn in missing:\n",
        "    for request, turn in uses:\n"
        "        if request.end >= request.conversation.start_of(turn + 1) and (request, turn) not in missing:\n"
        "            cache.pass_by(request.request_id, request.key(turn))\n"
        "    for request, turn in missing:\n",
        ("tests/scheduler/test_turns.py",),
    ),
    Mutation(
        "siblings that all read",
        f"{SCHEDULER}/scheduler.py",
        "return ready and not self._is_read_by_another(request)",
        "return ready",
        ("tests/scheduler/test_turns.py",),
    ),
    Mutation(
        "turns without a key of their own",
        f"{SCHEDULER}/block_keys.py",
        "for instruction in turns)]",
        "for instruction in turns[:0])]",
        ("tests/scheduler/test_shared_rows.py", "tests/scheduler/test_turns.py"),
    ),
    Mutation(
        "patience without end",
        f"{SCHEDULER}/starvation.py",
        "self.steps >= PATIENCE",
        "self.steps >= PATIENCE * 1000",
        ("tests/scheduler/test_fairness.py",),
    ),
    Mutation(
        "salt left out",
        f"{FRONTEND}/inputs.py",
        'turn_digests(tokens, turns, request.cache_salt or "")',
        "turn_digests(tokens, turns)",
        ("tests/frontend/test_inputs.py",),
    ),
    Mutation(
        "prompt embeddings under an adapter",
        f"{FRONTEND}/inputs.py",
        "if request.prompt_embeds is not None or request.mm_features:",
        "if request.mm_features:",
        ("tests/frontend/test_inputs.py",),
    ),
    Mutation(
        "adapter evicted while its requests run",
        f"{FRONTEND}/adapters.py",
        "if key not in self._in_use and key not in self._pinned",
        "if key not in self._pinned",
        ("tests/frontend/test_adapters.py", "tests/frontend/test_held.py"),
    ),
    Mutation(
        "load that ends with its client",
        f"{FRONTEND}/adapters.py",
        "await asyncio.shield(load)",
        "await load",
        ("tests/frontend/test_adapters.py",),
    ),
    Mutation(
        "held request forgotten",
        f"{FRONTEND}/held.py",
        "return wrapped(*args, **kwargs) or (requests is not None and bool(requests.held))",
        "return wrapped(*args, **kwargs)",
        ("tests/frontend/test_held.py",),
    ),
    Mutation(
        "wrong site width",
        f"{LAYERS}/sites.py",
        'SiteShard("v", value, kv_rank * value)',
        'SiteShard("v", value, kv_rank * query)',
        ("tests/layers/test_sites.py",),
    ),
    Mutation(
        "base model's row not ones",
        f"{LAYERS}/generator.py",
        "self.table = torch.ones(",
        "self.table = torch.zeros(",
        ("tests/layers/test_hooks.py",),
    ),
    Mutation(
        "one routing pass",
        "vllm_parade/ops/reference.py",
        "ROUTING_PASSES = 2",
        "ROUTING_PASSES = 1",
        ("tests/ops/test_reference.py",),
    ),
)
