"""A work item: what the executor has given to the ranks, and holds until their answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tacod.execution.manifest import Model
from tacod.execution.scheduler import Job
from tacod.group.work import Command, Progress

__all__ = ["Purpose", "WorkItem"]


class Purpose(enum.Enum):
    """Why the ranks are to do something."""

    STEP = "step"
    """It is a step of a job."""
    FETCH = "fetch"
    """It loads the model that a job's next step needs."""
    CLEAR = "clear"
    """It evicts a model, because a job's step found no memory."""
    RESTORE = "restore"
    """It loads a model for which no client asked: to preload it, or because the ranks are new."""


@dataclass
class WorkItem:
    """One command, whose it is and what goes with it."""

    purpose: Purpose
    command: Command
    timeout_s: float
    job: Job | None = None
    """The running job; None for `Purpose.RESTORE`."""
    model: Model | None = None
    """The model that it loads, if it loads one."""
    evicts: list[str] = field(default_factory=list)
    """The models that go with it: a load takes their place, or what they were made of goes."""
    digests: list[bytes] = field(default_factory=list)
    """The stored tensors that the command may name."""
    queue_s: float = 0.0
    """How long the job's step has waited for its turn."""
    progress: Progress | None = None
    """How far a load is, as its client was informed last."""
