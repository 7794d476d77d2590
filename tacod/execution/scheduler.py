"""Who runs next: a state machine without I/O.

A job is a list of steps. All ranks do a step together, and one step runs at a time. Sessions take turns step by step,
so a long sampling run delays another client's forward by one step only. A job ends once: with a result, a failure or a
cancellation. Every method that can end jobs returns those that it ended.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tacod.execution.manifest import Model
from tacod.group.work import Forward, MethodCall, Sample, Unload
from tacod_client.errors import Cancelled, JobNotFound, OutOfMemory, QueueFull, RankFailed, TacodError, Unavailable

__all__ = ["ON_MODEL", "Job", "Outcome", "Scheduler", "Verb", "Work"]

Work = Model | Unload | Forward | MethodCall | Sample
"""What a job gives the ranks to do."""


class Verb(enum.Enum):
    """What a job asks of the ranks."""

    LOAD = "load"
    UNLOAD = "unload"
    FORWARD = "forward"
    CALL = "call"
    SAMPLE = "sample"


ON_MODEL = Verb.FORWARD, Verb.CALL, Verb.SAMPLE
"""Those whose model is loaded for their turn, if it isn't there."""


class Outcome(enum.Enum):
    """How a job ended."""

    RESULT = "result"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Job:
    """One request that the ranks work on, and what became of it."""

    id: str
    session: bytes
    request: int
    verb: Verb
    model: str
    body: Work
    """The model to load, or what the ranks get; of a sampling run, its inputs."""
    steps: int
    nbytes: int = 0
    """Bytes of the tensors that came with the request."""
    digests: list[bytes] = field(default_factory=list)
    """Tensors of the store that it needs."""
    restores: list[bytes] = field(default_factory=list)
    """Stored tensors that its model's patches need if that model is loaded again for the job's turn."""
    submitted_s: float = 0.0
    ready_s: float | None = None
    """When its next step could have begun, after the first step; a retry counts its wait from then too."""
    evict_next: str = ""
    """The model to evict when the job's load is tried again after it found no memory."""
    step: int = 0
    kept: int = 0
    """Of a sampling run, the first so many steps: what they came to is kept, so that new ranks go on behind them."""
    record: list[bytes] = field(default_factory=list)
    """What these steps' forwards have given, in the store."""
    begins: bool = True
    """Whether the ranks need its inputs with its next step: they don't hold the run."""
    attempts: int = 1
    tries: int = 1
    """Attempts since the last step that is kept."""
    cause: str = ""
    """What ended the ranks at its last attempt, as `GroupLost.cause` has it."""
    started_s: float | None = None
    cancelling: bool = False
    outcome: Outcome | None = None
    error: TacodError | None = None
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of all steps so far, by part (see docs/protocol.md, ``timing``)."""
    skipped: int = 0
    """How many forwards so far a step cache mostly skipped."""

    def end(self, outcome: Outcome, error: TacodError | None = None) -> Job:
        """Record how the job ended; called once."""
        assert self.outcome is None, f"job {self.id} ended twice"
        self.outcome, self.error = outcome, error
        return self

    def begin_anew(self) -> None:
        """The ranks hold nothing of it: it begins again, behind the steps that are kept."""
        self.step, self.begins = self.kept, True


class Scheduler:
    """Queues by session, and the one running job."""

    def __init__(self, limit: int, retries: int, is_completed: Callable[[], bool] = lambda: False) -> None:
        """``is_completed`` says whether the running job's client may have its result, before all ranks have answered.

        Then the job counts towards no limit and can't be cancelled.
        """
        self._is_completed = is_completed
        self.limit = limit
        self.retries = retries
        self.draining = False
        self.running: Job | None = None
        self._queues: OrderedDict[bytes, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        """Jobs that wait, the running one not among them."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def jobs(self) -> list[Job]:
        """The running job, then the waiting ones in the order in which they would start."""
        running = [self.running] if self.running else []
        queues = [list(queue) for queue in self._queues.values()]
        longest = max(map(len, queues), default=0)
        return running + [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]

    @property
    def heads(self) -> list[Job]:
        """The first waiting job of each session."""
        return [queue[0] for queue in self._queues.values()]

    @property
    def unfinished(self) -> list[Job]:
        """The `jobs` without a running one that is completed."""
        stoppable = self._stoppable
        return [job for job in self.jobs if job is not self.running or job is stoppable]

    @property
    def _stoppable(self) -> Job | None:
        """The running job, unless it is completed."""
        return None if self.running is None or self._is_completed() else self.running

    def submit(self, job: Job, others: int = 0) -> None:
        """Queue a job behind its session's others. As many ``others``, of other groups, count towards the limit.

        Raises `Unavailable` while draining and `QueueFull` at the limit.
        """
        if self.draining:
            raise Unavailable(
                "tacod is draining: it ends what it has and takes no new work; ask again after its restart",
                stopping=True,
            )
        count = len(self.unfinished) + others
        if count >= self.limit:
            raise QueueFull(
                f"{count} jobs are queued, which is the limit (limits.queue); wait for one to end",
                limit=self.limit,
            )
        self.adopt(job)

    def adopt(self, job: Job) -> None:
        """Queue a job that another group had accepted."""
        self._queues.setdefault(job.session, deque()).append(job)

    def release(self, job: Job) -> None:
        """Give a waiting job to another group."""
        self._remove(job)

    def release_all(self) -> list[Job]:
        """Give all jobs to other groups; none is running."""
        assert self.running is None
        jobs = self.jobs
        self._queues.clear()
        return jobs

    def next(self, now: float, is_put_off: Callable[[Job], bool] = lambda job: False) -> Job | None:
        """Start a step of the next session's first job; None if a step is running or no job can start.

        A session whose first job is put off keeps its place while others go on.
        """
        if self.running is not None:
            return None
        ready = ((session, queue) for session, queue in self._queues.items() if not is_put_off(queue[0]))
        session, queue = next(ready, (b"", None))
        if queue is None:
            return None
        job = queue.popleft()
        if queue:
            self._queues.move_to_end(session)
        else:
            del self._queues[session]
        if job.started_s is None:
            job.started_s = now
        self.running = job
        return job

    def finish_step(self) -> Job | None:
        """The running step is done.

        If it was the job's last, or the job is being cancelled, the job ends and is returned. Otherwise the job goes
        back to the head of its session's queue, and its session to the end of the round.
        """
        job = self._take_running()
        job.step, job.begins = job.step + 1, False
        if job.cancelling:
            return job.end(Outcome.CANCELLED, _cancelled(job))
        if job.step == job.steps:
            return job.end(Outcome.RESULT)
        self._put_back(job)
        return None

    def fail_step(self, error: TacodError) -> Job:
        """The running step failed on all ranks alike: the job ends."""
        job = self._take_running()
        if job.cancelling:
            return job.end(Outcome.CANCELLED, _cancelled(job))
        return job.end(Outcome.FAILED, error)

    def repeat_step(self) -> None:
        """Do the running step again, next."""
        self._put_back(self._take_running(), first=True)

    def lose_group(
        self, reason: str, error: TacodError | None = None, cause: str = "", counts: bool = True
    ) -> list[Job]:
        """The ranks are gone, and so is the progress of jobs: started jobs begin again, behind the steps that are kept.

        This counts as an attempt of the running job. After ``retries`` more attempts, or the second time for the same
        ``cause``, both since the last step that is kept, it fails, with `RankFailed` or with the ``error`` that one of
        the ranks gave. A lack of memory fails it at once. Without ``counts`` it is tried again in any case, as new
        ranks will have more memory free. Returns the ended jobs.
        """
        for queue in self._queues.values():
            for job in queue:
                job.begin_anew()
                job.evict_next = ""
        if self.running is None:
            return []
        job = self._take_running()
        if job.cancelling:
            return [job.end(Outcome.CANCELLED, _cancelled(job))]
        if not counts:
            job.begin_anew()
            self._put_back(job, first=True)
            return []
        last = job.tries > self.retries or (cause != "" and cause == job.cause)
        if isinstance(error, OutOfMemory) or (error is not None and last):
            return [job.end(Outcome.FAILED, error)]
        if last:
            what = f"{job.verb.value} failed {job.attempts} times, each time with new ranks; last: {reason}"
            return [job.end(Outcome.FAILED, RankFailed(what, attempts=job.attempts))]
        job.attempts, job.tries, job.cause = job.attempts + 1, job.tries + 1, cause
        job.begin_anew()
        self._put_back(job, first=True)
        return []

    def cancel(self, job_id: str) -> list[Job]:
        """Cancel a job: at once if it waits, at the end of its step if it runs.

        Raises `JobNotFound`, also for one that is completed. Returns the ended jobs.
        """
        for job in self.unfinished:
            if job.id != job_id:
                continue
            if job is self.running:
                job.cancelling = True
                return []
            self._remove(job)
            return [job.end(Outcome.CANCELLED, _cancelled(job))]
        raise JobNotFound(f"no job {job_id!r} is queued or running; `tacoctl ps` lists them", job=job_id)

    def drop(self, session: bytes) -> list[Job]:
        """Forget a session: its waiting jobs end now, its running one at the end of its step."""
        running = self._stoppable
        if running is not None and running.session == session:
            running.cancelling = True
        return [job.end(Outcome.CANCELLED, _cancelled(job)) for job in self._queues.pop(session, deque())]

    def fail_all(self, error: TacodError) -> list[Job]:
        """End every job with ``error``: the group was given up, or draining took too long."""
        jobs = self.jobs
        self.running = None
        self._queues.clear()
        return [
            job.end(Outcome.CANCELLED, _cancelled(job)) if job.cancelling else job.end(Outcome.FAILED, error)
            for job in jobs
        ]

    def _take_running(self) -> Job:
        assert self.running is not None, "no step is running"
        job, self.running = self.running, None
        return job

    def _put_back(self, job: Job, first: bool = False) -> None:
        self._queues.setdefault(job.session, deque()).appendleft(job)
        self._queues.move_to_end(job.session, last=not first)

    def _remove(self, job: Job) -> None:
        queue = self._queues[job.session]
        queue.remove(job)
        if not queue:
            del self._queues[job.session]


def _cancelled(job: Job) -> Cancelled:
    return Cancelled(f"{job.verb.value} {job.id} was cancelled at step {job.step} of {job.steps}", job=job.id)
