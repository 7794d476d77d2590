"""What long steps of sampling runs came to, kept in the store: new ranks go on behind them."""

from __future__ import annotations

import logging

from tacod.execution.scheduler import Job, Verb
from tacod.execution.store import Store
from tacod.group.work import Stepped
from tacod_client.errors import QueueFull

__all__ = ["KeptSteps"]

log = logging.getLogger(__name__)


class KeptSteps:
    """Keeps what the forwards of each step gave, as long as all steps of the run before are kept.

    They make way for everything else: for what clients upload, and for the patches of loaded models.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: dict[str, Job] = {}
        """Those of which steps are kept, by the jobs' ids."""
        self._keeping = False
        store.make_way = self._make_way

    def keep(self, job: Job, step: Stepped) -> None:
        """Keep a step that is just done, if the ranks have told what its forwards gave, and there is room.

        All runs may need half of the store for that. Once a step isn't kept, none of its run is.
        """
        if job.verb is not Verb.SAMPLE or job.kept != job.step:
            return
        if not step.record:
            self.drop(job)
            return
        held = [digest for each in self._runs.values() for digest in each.record]
        more = sum(each.nbytes for each in step.record)
        nbytes = self._store.size_of(held) + more
        self._keeping = True
        try:
            if nbytes > self._store.limit // 2:
                raise QueueFull(f"kept steps of runs would take {nbytes} bytes, over half of limits.store_bytes")
            if more > self._store.room:
                # New ranks load patched models again only from there.
                raise QueueFull(f"{more} bytes more would leave no room for the patches of loaded models")
            digests = self._store.put_all(step.record)
        except QueueFull as error:
            self._begins_anew(job, error.message)
            return
        finally:
            self._keeping = False
        self._store.pin(digests)
        job.record += digests
        job.kept, job.tries, job.cause = job.step + 1, 1, ""
        self._runs[job.id] = job

    def drop(self, job: Job) -> None:
        """Keep nothing of a run any more."""
        self._store.unpin(job.record)
        job.record, job.kept = [], 0
        self._runs.pop(job.id, None)

    def _make_way(self) -> bool:
        """Give up the steps of the run that has most of them; returns whether there was one."""
        if self._keeping or not self._runs:
            # One run's steps take no room from another's.
            return False
        largest = max(self._runs.values(), key=lambda job: self._store.size_of(job.record))
        self._begins_anew(largest, "others need the tensor store")
        return True

    def _begins_anew(self, job: Job, reason: str) -> None:
        log.info("job %s begins anew if the ranks are lost: %s", job.id, reason)
        self.drop(job)
