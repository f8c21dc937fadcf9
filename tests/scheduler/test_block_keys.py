# SPDX-License-Identifier: Apache-2.0
"""The keys of KV blocks, where vLLM hashes blocks and where it publishes KV events."""

from vllm.v1.core import block_pool
from vllm.v1.core.kv_cache_utils import to_event_extra_keys
from vllm.v1.simple_kv_offload import manager as offload

from tests.scheduler.conftest import ASSISTANT, BLOCK, USER
from vllm_parade.scheduler.block_keys import conversation_of

# Turns start at 5 and 6, both in the second block, and at 12, the start of the fourth.
TOKENS = [3, 4, 5, 6, 3, USER, USER, 8, ASSISTANT, 9, 9, 9, USER, 8, ASSISTANT, 9, 9, 9, 9, 9]


def test_a_block_has_a_key_for_each_turn_that_starts_in_it(make_engine):
    engine = make_engine()
    engine.add("a", len(TOKENS), "A", tokens=TOKENS, marked=True, salt="mine")
    engine.add("b", len(TOKENS), tokens=TOKENS)
    request, base = (engine.scheduler.requests[name] for name in "ab")
    turns = [("parade", f"A:{one.digest}") for one in conversation_of(request).instructions]
    wanted = [(("cache_salt", "mine"),), tuple(turns[:2]), None, (turns[2],), None]
    # Modules import vLLM's function by name: events and offloading must see the same keys as hashing.
    for module in (block_pool, offload):
        keys = module.generate_block_hash_extra_keys
        assert [keys(request, start, start + BLOCK, 0)[0] for start in range(0, len(TOKENS), BLOCK)] == wanted
        assert [keys(base, start, start + BLOCK, 0)[0] for start in range(0, len(TOKENS), BLOCK)] == [None] * 5
    assert to_event_extra_keys(wanted)[3] == (turns[2][1],)
