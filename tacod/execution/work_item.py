"""A work item: what the executor has given to the ranks, until they report."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tacod.execution.manifest import Model
from tacod.execution.scheduler import Job
from tacod.group.board import Blocks
from tacod.group.work import Command, Progress

__all__ = ["Purpose", "WorkItem"]


class Purpose(enum.Enum):
    """Why the ranks do something."""

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
    """A command, the job that it is for, and what the executor needs when the ranks report."""

    purpose: Purpose
    command: Command
    timeout_s: float
    job: Job | None = None
    """The running job; None for `Purpose.RESTORE`."""
    model: Model | None = None
    """The model that the command loads, if any."""
    evicts: list[str] = field(default_factory=list)
    """The models that the command removes: to make room, or because they share with the one that is unloaded."""
    digests: list[bytes] = field(default_factory=list)
    """The stored tensors that the command may name."""
    queue_s: float = 0.0
    """How long the job's step has waited for its turn."""
    progress: Progress | None = None
    """The progress of a load that its client was told last."""
    watched: bool = False
    """Whether its forwards may be long: see `tacod.group.work.Envelope.watched`."""
    blocks: Blocks | None = None
    """The progress of a long forward that its client was told last."""
    began_s: float = 0.0
    """When the ranks got it."""
