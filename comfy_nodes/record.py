"""What a sampling run came to: its forwards in the daemon, and when each of its steps ended."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import ref

from tacod_client import Call, Model
from tacod_client.stats import PARTS

__all__ = ["Latest", "Record", "Run", "Totals", "latest"]


class Run:
    """One run, from where its block begins to where it ends."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.steps_s: list[float] = []
        """Wall time of each step."""
        self.seconds = 0.0
        self._started_s = self._stepped_s = 0.0
        self._model: ref[Model] | None = None
        """The last one that was called; all that are called in a run are of one client."""

    def __enter__(self) -> Run:
        self._started_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._started_s

    def note(self, model: Model) -> None:
        """Note the model's last call; the daemon may tell of its time while the next one is under way."""
        self._model = ref(model)
        model.hear_last(self.calls.append)

    def settle(self) -> None:
        """Wait for what the daemon has yet to tell of its calls; see `Model.settle`."""
        model = self._model() if self._model is not None else None
        if model is not None:
            model.settle()

    def watch(
        self,
        execute: Any,
        noise: Any,
        latent: Any,
        sampler: Any,
        sigmas: Any,
        mask: Any,
        callback: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """A wrapper around ComfyUI's sampling that notes each step's end."""
        self._stepped_s = time.perf_counter()

        def step(*args: Any, **kwargs: Any) -> Any:
            result = callback(*args, **kwargs) if callback is not None else None
            now = time.perf_counter()
            self.steps_s.append(now - self._stepped_s)
            self._stepped_s = now
            return result

        return execute(noise, latent, sampler, sigmas, mask, step, *rest, **named)

    def to_stats(self) -> dict[str, Any]:
        """The run in numbers; times in seconds, and those of the forwards as sums over them."""
        steps = sorted(self.steps_s)
        return {
            "steps": len(steps),
            "seconds": self.seconds,
            "step_mean_s": statistics.fmean(steps) if steps else 0.0,
            "step_p95_s": steps[math.ceil(0.95 * len(steps)) - 1] if steps else 0.0,
            **self.forwards(),
        }

    def forwards(self) -> dict[str, Any]:
        """Its forwards so far in numbers; times in seconds, as sums."""
        calls = list(self.calls)
        alone = [call.single_rank_s for call in calls]
        return {
            "forwards": len(calls),
            "parallel_forwards": sum(call.ranks > 1 for call in calls),
            "forward_s": sum(call.seconds for call in calls),
            **{f"{part}_s": sum(getattr(call, f"{part}_s") for call in calls) for part in PARTS},
            "ranks": max((call.ranks for call in calls), default=0),
            "plan": calls[-1].plan if calls else "",
            "retries": sum(call.attempts - 1 for call in calls),
            "single_rank_s": None if not alone or None in alone else sum(filter(None, alone)),
        }


@dataclass(frozen=True)
class Latest:
    """The last run of a model in a daemon, which may still go on."""

    model: str
    family: str
    run: Run

    def to_wire(self) -> dict[str, Any]:
        """The run so far, for the sidebar."""
        return {"model": self.model, "family": self.family, **self.run.forwards()}


latest: dict[str, Latest] = {}
"""The last run in each daemon, by its endpoint."""


class Record:
    """The runs under way through one network."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._latest: Run | None = None

    def begin(self, endpoint: str, model: str, family: str) -> None:
        """A sampling begins: it is the last run in the daemon from now on."""
        self._latest = Run()
        latest[endpoint] = Latest(model, family, self._latest)

    def add(self, model: Model) -> None:
        """Note the model's last call in every run that is under way."""
        for run in (*self._runs, *([self._latest] if self._latest is not None else [])):
            run.note(model)

    @contextmanager
    def to(self, run: Run) -> Iterator[None]:
        """Note calls in ``run`` for as long as the block lasts."""
        self._runs.append(run)
        try:
            yield
            run.settle()
        finally:
            self._runs.remove(run)


class Totals:
    """How often each model has run in this process, and for how long."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, name: str, run: Run) -> dict[str, Any]:
        """Count a run, and tell the number of runs and their mean seconds."""
        seconds = self._seconds.setdefault(name, [])
        seconds.append(run.seconds)
        return {"executions": len(seconds), "mean_s": statistics.fmean(seconds)}
