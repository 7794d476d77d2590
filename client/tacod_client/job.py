"""A sampling run, seen from the client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tacod_client.stats import ModelStats
from tacod_client.tensors import all_like
from tacod_client.wire import Message

__all__ = ["Job", "Progress"]


@dataclass(frozen=True)
class Progress:
    """A step of a sampling run is done."""

    step: int
    """Counts from 1; starts again if the run does: a rank died in a run of short steps, or the daemon was restarted."""
    total: int
    sigma: float
    """The latent's noise level after the step."""
    elapsed_s: float
    """Seconds since the run's first step began."""


class Job:
    """A sampling run under way: iterate over it for its steps, then take the result.

    The run goes on in the daemon whether or not anyone iterates.
    """

    def __init__(
        self, messages: Iterator[Message], example: Any, stats: ModelStats, cancel: Callable[[str], object]
    ) -> None:
        self._messages = messages
        self._example = example
        self._stats = stats
        self._cancel = cancel
        self._started = time.perf_counter()
        self._result: Any = None
        self._error: BaseException | None = None
        self.id: str = ""
        """The daemon's name for it; empty until the daemon has accepted it."""
        self.total = 0
        """How many steps the run has; 0 until the daemon has accepted it."""
        self._advance()

    def _advance(self) -> Progress | None:
        """Receive the next message; returns a `Progress` if it was one."""
        if self._error is not None:
            raise self._error
        try:
            message = next(self._messages)
        except BaseException as error:
            self._error = error
            raise
        body = message.body
        if message.type == "accepted":
            self.id, self.total = body["job"], body["total"]
            return None
        if message.type == "progress":
            return Progress(body["step"], body["total"], body["sigma"], body["elapsed_s"])
        self._result = all_like(body["out"], self._example)
        self._stats.samples += 1
        self._stats.add(body, time.perf_counter() - self._started)
        next(self._messages, None)
        return None

    def __iter__(self) -> Iterator[Progress]:
        """One `Progress` for each step that is done, as it is done.

        If steps are faster than they travel, the latest one counts. Raises `Cancelled`, or why it failed.
        """
        while self._result is None:
            progress = self._advance()
            if progress is not None:
                yield progress

    def result(self) -> Any:
        """Wait for the end and return the latent, of ``noise``'s kind, dtype, shape and device; or a list of latents.

        Raises `Cancelled`, or why it failed.
        """
        for _ in self:
            pass
        return self._result

    def cancel(self) -> None:
        """Cancel the run on all ranks, at its next step or before the next block of a long one.

        `result` raises `Cancelled` then.
        """
        self._cancel(self.id)
