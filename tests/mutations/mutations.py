# SPDX-License-Identifier: Apache-2.0
"""Ways to break the package, each with the tests that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    name: str
    file: str
    before: str
    """Text that stands once in the file."""
    after: str
    tests: tuple[str, ...]
    """Arguments of pytest; at least one of these tests must fail."""


LAYERS, SCHEDULER, FRONTEND = "vllm_parade/layers", "vllm_parade/scheduler", "vllm_parade/frontend"
EXACT = ("tests/e2e/test_architectures.py", "-k", "Llama")
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
        "GeneratorJob(row, start, instruction.tokens, slot, layout)",
        "GeneratorJob(row, start, max(1, instruction.tokens - 1), slot, layout)",
        EXACT,
    ),
    Mutation(
        "digest one token short",
        f"{FRONTEND}/inputs.py",
        "request.prompt_token_ids[:tokens]",
        "request.prompt_token_ids[: tokens - 1]",
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
        "cached keys and values before the instruction is read",
        f"{SCHEDULER}/scheduler.py",
        "skip, request.skip_reading_prefix_cache = request.skip_reading_prefix_cache, True",
        "skip = request.skip_reading_prefix_cache",
        ("tests/scheduler/test_steps.py", "tests/scheduler/test_shared_rows.py", "tests/scheduler/test_random.py"),
    ),
    Mutation(
        "instruction in parts",
        f"{SCHEDULER}/scheduler.py",
        "if num_computed_tokens > 0 or num_new_tokens < instruction.tokens or not self._can_generate(instruction):",
        "if num_computed_tokens > 0 or not self._can_generate(instruction):",
        ("tests/scheduler/test_steps.py",),
    ),
    Mutation(
        "patience without end",
        f"{SCHEDULER}/scheduler.py",
        "or self.squeezed_steps < PATIENCE",
        "or self.squeezed_steps < PATIENCE * 1000",
        ("tests/scheduler/test_fairness.py",),
    ),
    Mutation(
        "salt left out",
        f"{FRONTEND}/inputs.py",
        "request.cache_salt = f\"parade:{_SECRET}:{adapter}:{instruction.digest}:{request.cache_salt or ''}\"",
        "pass",
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
