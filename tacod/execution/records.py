"""What steps and loads took: the daemon's metrics, and times on one rank for speed-ups."""

from __future__ import annotations

from typing import Any

from tacod.execution.manifest import Manifest
from tacod.execution.paces import Paces
from tacod.execution.scheduler import Job
from tacod.group.group import Answer
from tacod.group.work import Forward, Sample, Stepped
from tacod.observe.baselines import Baselines, shapes_of
from tacod.observe.metrics import Metrics, StepTimes

__all__ = ["Records"]


class Records:
    """Records each step in its job, in the metrics and, with its plan, in the manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.metrics = Metrics()
        self._baselines = Baselines()
        self._paces = Paces()
        self._manifest = manifest

    def read_step(self, job: Job, answer: Answer, queue_s: float) -> tuple[Stepped, StepTimes]:
        """The result of a finished step of a job that waited ``queue_s`` for its turn, and its times.

        What the job's client is told of them is noted.
        """
        assert answer.done is not None
        step = answer.done.result
        assert isinstance(step, Stepped)
        compute_s, collective_s = answer.done.compute_s, answer.done.collective_s
        times = StepTimes(
            queue_s=queue_s,
            wire_s=max(answer.elapsed_s - compute_s - collective_s, 0.0),
            compute_s=compute_s,
            collective_s=collective_s,
        )
        for name, seconds in vars(times).items():
            job.times[name] = job.times.get(name, 0.0) + seconds
        # A run that lost its ranks counts anew.
        job.skipped = step.skipped + (job.skipped if job.step else 0)
        if isinstance(job.body, Forward) and step.ranks == 1 and not step.skipped and not step.prefix_misses:
            self._baselines.note(self._kind_of(job), _shapes(job.body), compute_s)
        return step, times

    def note_step(self, job: Job, answer: Answer, step: Stepped, times: StepTimes) -> None:
        """Record a finished step in the metrics, and with its plan."""
        self.metrics.add_step(times, step.forwards, step.ranks, step.skipped, step.prefix_hits, step.prefix_misses)
        if step.forwards:
            if not step.skipped:
                # What a step cache skips is short, and tells nothing of the forward after it.
                self._paces.note(self._work_of(job), answer.elapsed_s / step.forwards)
            self._manifest.note_plan(job.model, step.plan)

    def may_be_long(self, job: Job) -> bool:
        """Whether the forwards of a job's next step are long, by those of this kind before; an unknown one may be."""
        return isinstance(job.body, Forward | Sample) and self._paces.may_be_long(self._work_of(job))

    def _work_of(self, job: Job) -> Any:
        """What a job's forwards have in common with others that take as long."""
        body = job.body
        assert isinstance(body, Forward | Sample)
        return body.model, repr(body.plan), _shapes(body)

    def single_rank_s(self, job: Job) -> float | None:
        """Seconds of a forward like this job's on one rank; None if there was none yet."""
        return self._baselines.of(self._kind_of(job), _shapes(job.body)) if isinstance(job.body, Forward) else None

    def _kind_of(self, job: Job) -> str:
        """The file and dtype: patches change no time."""
        if job.model not in self._manifest:
            return job.model
        model = self._manifest.find(job.model)
        return f"{model.path} {model.dtype}"


def _shapes(body: Forward | Sample) -> Any:
    """The shapes of a forward's arguments, or of a run's."""
    if isinstance(body, Sample):
        return shapes_of(vars(body))
    return shapes_of(body.arguments) if body.alike is None else body.alike.shapes
