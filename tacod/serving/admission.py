"""What a client's jobs may hold beside all others': a job that is over its share is refused."""

from __future__ import annotations

from tacod.execution.store import COUNT, Named
from tacod.serving.sessions import Session
from tacod.serving.state import State
from tacod_client.errors import QueueFull

__all__ = ["check_admission"]


def check_admission(state: State, session: Session, named: Named) -> None:
    """Raise `QueueFull` if a job with these tensors, beside the jobs that there are, would be more than there may be.

    A user may have ``limits.queue_per_user`` jobs. All of one client's jobs but the first may need half of the store
    together. The tensors that came with jobs have their share of the memory.
    """
    jobs = state.groups.unfinished
    if not jobs:
        # All limits leave room for one.
        return
    mine = {each for job in jobs if job.session == session.token for each in job.digests}
    if mine and not mine.issuperset(named.digests):
        _check_share(state, mine.union(named.digests))
    limit = state.config.limits.queue_per_user
    owners = (state.sessions.get(job.session) for job in jobs)
    if sum(owner is not None and owner.user == session.user for owner in owners) >= limit:
        raise QueueFull(
            f"{limit} jobs of {session.user} are queued, which is the limit (limits.queue_per_user); wait for one",
            limit=limit,
        )
    limit = state.config.limits.share_bytes
    queued = sum(job.nbytes for job in jobs)
    if queued and queued + named.nbytes > limit:
        raise QueueFull(
            f"queued jobs hold {queued} bytes of tensors, and {named.nbytes} more are over their share of "
            f"limits.memory_bytes, {limit}; wait for one to end",
            limit=limit,
        )


def _check_share(state: State, digests: set[bytes]) -> None:
    store = state.groups.host.store
    held, limit = store.size_of(digests), store.limit // 2
    if held > limit or len(digests) > COUNT // 2:
        raise QueueFull(
            f"this client's jobs would need {held} bytes and {len(digests)} tensors of the store, and may need half "
            f"of it: {limit} bytes (limits.store_bytes) and {COUNT // 2} tensors; wait for one to end",
            limit=limit,
        )
