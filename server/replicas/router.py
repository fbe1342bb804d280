"""Ray Serve's router of requests, which asks `PrefixRule`. Probing, queueing and retrying are Serve's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.replicas.open_requests import OpenRequests
from server.replicas.prefix_rule import PrefixRule


class PrefixRouter(RequestRouter):
    """A request's first argument is the blocks of its prompt.

    Serve's FIFOMixin would give a choice to whichever request waits longest, not to the one that it was made for.
    """

    def initialize_state(self, *, capacity: int) -> None:
        """Serve calls this with the configuration's `request_router_kwargs`."""
        self._rule = PrefixRule(capacity=capacity)
        self._open_requests = OpenRequests()

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The rule's choice, and all replicas, should that one be full or gone."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # there is nothing else to try without a pause
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not replicas:
            return []
        loads = {name: self._load(replica.replica_id) for name, replica in replicas.items()}
        chosen = self._rule.choose(blocks_of(pending_request), loads)
        if pending_request is not None:
            self._open_requests.choose(pending_request.metadata.internal_request_id, chosen)
        return [[replicas[chosen]], list(replicas.values())]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        self._rule.keep(names)
        self._open_requests.keep(names)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._open_requests.send(pending_request.metadata.internal_request_id, replica_id.unique_id)
        self._rule.remember(replica_id.unique_id, blocks_of(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve calls this for every call that was sent, also to all replicas, and for those that were refused."""
        self._open_requests.complete(internal_request_id)

    def _load(self, replica_id: ReplicaID) -> int:
        """Requests of this front, or of all fronts where Serve knows them: what it knows is forgotten after 10 s."""
        return max(self._open_requests.count(replica_id.unique_id), self.replica_queue_len_cache.get(replica_id) or 0)


def blocks_of(request: PendingRequest | None) -> Sequence[bytes]:
    return request.args[0] if request is not None and request.args else ()
