# SPDX-License-Identifier: Apache-2.0
"""The routing rule as a Ray Serve request router, with its metrics.

Serve pickles this module by value into every process that sends requests, so the module holds no state.
"""

from collections import OrderedDict

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util.metrics import Counter

from vllm_parade.cluster.routing import AffinityRule

# Conversations whose replica a router remembers.
CONVERSATIONS = 100_000


class AffinityRouter(RequestRouter):
    """Sends each request to the replica that `AffinityRule` chooses, by the queue lengths that Serve caches.

    The adapter's name comes from the request, not from Serve's multiplexed model ids. Those are meant for models that
    replicas load on demand, and only Serve's own strategy removes entries from the router's list of them.
    """

    def initialize_state(self, max_num_seqs: int, resident: int) -> None:
        """Called by Serve.

        Args:
            max_num_seqs: vLLM's max_num_seqs, the number of requests that an engine runs at a time
            resident: --max-parades, the number of adapters that an engine holds on its device
        """
        self.max_num_seqs, self.resident = max_num_seqs, resident
        self.rule: AffinityRule | None = None
        # Per replica, the adapters of its most recent requests. They are on its device if this is the only router.
        self.recent: dict[str, OrderedDict[str, None]] = {}
        # Per conversation, the replica of its last turn; the conversation with the latest turn is last.
        self.places: OrderedDict[bytes, str] = OrderedDict()
        self.max_places = CONVERSATIONS
        tags = {"application": self.app_name}
        self.routed = Counter(
            "vllm_parade_routed",
            "Requests by replica: the adapter's first one (home), one of the next in its order (spread), any other one "
            "(elsewhere), or any one for the base model (base).",
            tag_keys=("application", "place"),
        ).set_default_tags(tags)
        self.affinity = Counter(
            "vllm_parade_affinity",
            "Requests with an adapter whose replica recently got the same adapter (hit) or did not (miss).",
            tag_keys=("application", "result"),
        ).set_default_tags(tags)
        self.conversations = Counter(
            "vllm_parade_conversations",
            "Chat requests sent to the replica of the conversation's last turn (kept), to another replica (moved), or "
            "without an earlier turn that the router remembers (new).",
            tag_keys=("application", "result"),
        ).set_default_tags(tags)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then the others by load in case it rejects the request."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        loads = [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas]
        rule = self._rule([replica.replica_id.unique_id for replica in candidate_replicas])
        conversation = conversation_of(pending_request)
        last = None if conversation is None else self.places.get(conversation)
        kept = rule.replicas.index(last) if last in rule.replicas else None
        place = rule.choose(adapter_of(pending_request), loads, kept=kept)
        chosen = candidate_replicas[place]
        others = sorted(zip(loads, candidate_replicas, strict=True), key=lambda pair: pair[0])
        return [[chosen], *([replica] for _, replica in others if replica is not chosen)]

    def _rule(self, names: list[str]) -> AffinityRule:
        if self.rule is None or self.rule.replicas != names:
            self.rule = AffinityRule(names, self.max_num_seqs)
            self.recent = {name: self.recent.get(name, OrderedDict()) for name in names}
        return self.rule

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Called by Serve when a replica has accepted a request; counts it by that replica."""
        adapter, name = adapter_of(pending_request), replica_id.unique_id
        self._remember(conversation_of(pending_request), name)
        if adapter is None:
            self.routed.inc(tags={"place": "base"})
            return
        rule = self._rule([one.unique_id for one in self.curr_replicas])
        order = [rule.replicas[place] for place in rule.order(adapter)]
        place = "home" if name == order[0] else "spread" if name in order else "elsewhere"
        self.routed.inc(tags={"place": place})
        recent = self.recent.setdefault(name, OrderedDict())
        self.affinity.inc(tags={"result": "hit" if adapter in recent else "miss"})
        recent[adapter] = None
        recent.move_to_end(adapter)
        if len(recent) > self.resident:
            recent.popitem(last=False)

    def _remember(self, conversation: bytes | None, name: str) -> None:
        if conversation is None:
            return
        last = self.places.get(conversation)
        self.conversations.inc(tags={"result": "new" if last is None else "kept" if last == name else "moved"})
        self.places[conversation] = name
        self.places.move_to_end(conversation)
        if len(self.places) > self.max_places:
            self.places.popitem(last=False)


def adapter_of(pending_request: PendingRequest | None) -> str | None:
    """Name of the adapter of a request; None for the base model."""
    return getattr(pending_request.args[0], "adapter", None) if pending_request and pending_request.args else None


def conversation_of(pending_request: PendingRequest | None) -> bytes | None:
    """Key of the conversation of a request; None if the request is not a chat."""
    return getattr(pending_request.args[0], "conversation", None) if pending_request and pending_request.args else None
