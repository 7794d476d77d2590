"""What clients are sent about their jobs: progress, and one result or error."""

from __future__ import annotations

from typing import Any

from tacod.execution.executor import Executor
from tacod.execution.manifest import Model
from tacod.execution.scheduler import Job
from tacod.group.work import Stepped
from tacod.serving.report import loaded
from tacod.serving.sessions import Sessions
from tacod_client import wire
from tacod_client.wire import Message

__all__ = ["send_end", "send_progress"]


def send_progress(sessions: Sessions, job: Job, body: dict[str, Any]) -> None:
    """Send a job's progress, which replaces progress that was not sent yet."""
    session = sessions.get(job.session)
    if session is not None:
        session.post(wire.encode(Message("progress", body, job.request)), key=job.id)


def send_end(sessions: Sessions, executor: Executor, job: Job, step: Stepped | None) -> None:
    """Send a job's error or result, with which it has ended in the group of an ``executor``: at once, if that can be.

    A forward's or a sampling run's result is in its last ``step``.
    """
    session = sessions.get(job.session)
    if session is None:
        return
    if job.error is not None:
        session.post(wire.encode(Message("error", job.error.to_wire(), job.request)))
    else:
        session.post(wire.encode(Message("done", _result(executor, job, step), job.request)))
    # That it is gone is noticed when all are looked at.
    sessions.deliver(session)


def _result(executor: Executor, job: Job, step: Stepped | None) -> dict[str, Any]:
    if isinstance(job.body, Model):
        return loaded(executor, job.body)
    if step is None:
        return {"model": job.model}
    return {
        "out": step.out,
        "plan": step.plan,
        "ranks": step.ranks,
        "steps": job.steps,
        "skipped": job.skipped,
        "attempts": job.attempts,
        "timing": job.times,
        "single_rank_s": executor.records.single_rank_s(job),
    }
