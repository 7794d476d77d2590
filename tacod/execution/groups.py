"""The groups of ranks of this host: each has an executor, and jobs go to the one that has the model and is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tacod.config import Config, ConfigError
from tacod.execution.executor import Executor
from tacod.execution.host import Host
from tacod.execution.manifest import Manifest, Model
from tacod.execution.routes import Routes, fits
from tacod.execution.scheduler import Job, Outcome, Verb
from tacod.group.work import Stepped
from tacod.notify import notify
from tacod_client.errors import ArgumentError, JobNotFound, ModelNotFound, TacodError, Unavailable

__all__ = ["Groups", "preloaded"]

log = logging.getLogger(__name__)

Describe = Callable[[Manifest, int], Model]
"""The model of a load request, for a group with this manifest and so many ranks. Raises what `Manifest.describe` does.
"""


class Groups:
    """All executors as one. With a single group it adds nothing to what that does.

    ``devices`` are those of each group's ranks, ``preload`` the models that each is to have; ``on_progress`` and
    ``on_end`` are those of `Executor`.
    """

    def __init__(
        self,
        config: Config,
        devices: Sequence[list[str]],
        preload: Sequence[Iterable[Model]],
        folder: Path,
        on_progress: Callable[[Job, dict[str, Any]], None],
        on_end: Callable[[Executor, Job, Stepped | None], None],
    ) -> None:
        self.host = Host(config)
        self.executors: list[Executor] = []
        self.routes = Routes(self.executors)
        self.ready = False
        """Whether all groups were ready once, those apart that were given up before."""
        everybody = sum(map(len, devices))
        for group, of_group, models in zip(config.groups, devices, preload, strict=True):
            executor = Executor(
                config,
                group.name,
                of_group,
                models,
                folder,
                self.host,
                on_progress,
                on_end,
                self._pass_on,
                everybody - len(of_group),
            )
            self.executors.append(executor)

    def __iter__(self) -> Iterator[Executor]:
        return iter(self.executors)

    def __len__(self) -> int:
        return len(self.executors)

    # --- all of them ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``degraded`` (some ranks are being replaced or were given up) or ``draining``."""
        states = [each.state for each in self]
        if "draining" in states:
            return "draining"
        if any(each.given_up for each in self) or (self.ready and "degraded" in states):
            return "degraded"
        return "ready" if self.ready else "starting"

    @property
    def given_up(self) -> str | None:
        """Why no group's ranks are started again; None as long as those of one are."""
        reasons = [each.given_up for each in self]
        return None if None in reasons else "; ".join(map(str, reasons))

    @property
    def jobs(self) -> list[Job]:
        """The running and the waiting jobs, group by group."""
        return [job for each in self for job in each.scheduler.jobs]

    @property
    def unfinished(self) -> list[Job]:
        """The same without those that are completed: they count towards no limit."""
        return [job for each in self for job in each.scheduler.unfinished]

    @property
    def files(self) -> set[str]:
        """The real paths of all files that are loaded, that will be loaded, or that jobs need."""
        return {path for each in self for path in each.files}

    @property
    def restarts(self) -> int:
        """How many times ranks were replaced, those of all groups together."""
        return sum(each.group.restarts for each in self)

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when a rank begins, reports or ends."""
        return [source for each in self for source in each.group.sources]

    @property
    def wakes_at(self) -> list[float]:
        """The moments on the monotonic clock at which `poll` has something to do, whatever else happens."""
        return [moment for each in self for moment in each.wakes_at]

    def poll(self) -> None:
        """Move the work of all groups on."""
        for executor in self:
            executor.poll()
        if len(self) > 1:
            for executor in self:
                if executor.given_up is not None:
                    self._inherit(executor)
            self._spread()
        if not self.ready and self.given_up is None and all(each.ready or each.given_up for each in self):
            self.ready = True
            notify("READY=1")

    def apply_config(self, config: Config, preload: Sequence[Iterable[Model]]) -> None:
        """Apply another configuration of the same groups; models that it adds to the preloaded ones are loaded next."""
        self.host.apply_config(config)
        for executor, models in zip(self, preload, strict=True):
            executor.apply_config(config, models)

    def drain(self) -> None:
        """Take no new jobs from now on."""
        for executor in self:
            executor.scheduler.draining = True

    def abort(self, error: TacodError) -> None:
        """End all jobs with ``error``, and the ranks with them."""
        for executor in self:
            executor.abort(error)

    def close(self) -> None:
        """End the ranks, and free what clients share with them."""
        for executor in self:
            executor.close()
        self.host.memories.close()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def place(self, session: bytes, describe: Describe) -> tuple[Executor, Model]:
        """The group that is to load a model for a session, and the model as it is there: it is at home there now.

        Raises what ``describe`` does, `ArgumentError` if no group has enough ranks for the plan, and `Unavailable`.
        """
        choices, refused = [], None
        for executor in self.routes.live:
            try:
                choices.append((executor, describe(executor.manifest, executor.group.world_size)))
            except ArgumentError as error:
                refused = error
        if not choices:
            raise refused or Unavailable(self.given_up or "")
        executor, model = self.routes.for_load(session, choices)
        self.routes.settle(session, model, executor)
        return executor, model

    def check_model(self, model_id: str) -> None:
        """Check that a model is loaded, or can be loaded for a job's turn. Raises `ModelNotFound`."""
        self._find(model_id)

    def _find(self, model_id: str) -> Model:
        known = (each.residency.recall(model_id) for each in self)
        model = next((each for each in known if each is not None), None)
        if model is None:
            raise ModelNotFound(f"no model {model_id!r} is loaded; `tacoctl models` lists them", model=model_id)
        return model

    def submit(self, job: Job, executor: Executor | None = None) -> None:
        """Queue a job, a load in the group that `place` chose; see `Executor.submit`.

        Raises `ModelNotFound`, `Unavailable` and `QueueFull`.
        """
        if executor is None:
            executor = self._route(job)
        executor.submit(job, sum(len(each.scheduler.unfinished) for each in self if each is not executor))

    def _route(self, job: Job) -> Executor:
        if self.given_up is not None:
            raise Unavailable(self.given_up)
        model = self._find(job.model)
        if job.verb is Verb.UNLOAD:
            return (self._knowing(job.model) or self.routes.live)[0]
        executor = self.routes.for_job(job, model)
        if executor.residency.recall(job.model) is None:
            executor.manifest.remember(model.unloaded())
        return executor

    def _knowing(self, model_id: str) -> list[Executor]:
        """The groups that hold a model, or can load it again."""
        return [each for each in self.routes.live if each.residency.recall(model_id) is not None]

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; returns whether it has ended already. Raises `JobNotFound`."""
        for executor in self:
            if any(job.id == job_id for job in executor.scheduler.jobs):
                return executor.cancel(job_id)
        raise JobNotFound(f"no job {job_id!r} is queued or running; `tacoctl ps` lists them", job=job_id)

    def drop(self, session: bytes) -> None:
        """End a session's jobs and its uploads, and take back the memory that it shares."""
        self.routes.forget(session)
        for executor in self:
            executor.drop(session)

    def _spread(self) -> None:
        """Give jobs that wait to ranks that are free and hold their models."""
        for free in self.executors:
            if free.is_free and (found := self.routes.waiting_for(free)) is not None:
                waits, job = found
                waits.scheduler.release(job)
                free.adopt(job, None)
                free.poll()

    def _inherit(self, gone: Executor) -> None:
        """Another group remembers the models of one that is given up, and loads them for jobs that name them."""
        if not self.routes.live:
            return
        for model in gone.manifest.known:
            if not self._knowing(model.id):
                self.routes.live[0].manifest.remember(model.unloaded())
            gone.residency.forget(model.id)
        gone.residency.coming.clear()

    def _pass_on(self, done: Executor, job: Job) -> bool:
        """Whether another group than ``done`` goes on with a job: an unload to be repeated there, or a stranded job."""
        if job.verb is Verb.UNLOAD and job.outcome is Outcome.RESULT:
            # In the order of groups, so in each group once.
            behind = self.executors[self.executors.index(done) + 1 :]
            others = [each for each in self._knowing(job.model) if each in behind]
            if others:
                others[0].adopt(replace(job, outcome=None), None)
            return bool(others)
        if not self.routes.live:
            return False
        if isinstance(job.body, Model):
            choices = [(each, job.body) for each in self.routes.live if fits(job, each)]
            if choices:
                executor, _ = self.routes.for_load(job.session, choices)
                self.routes.settle(job.session, job.body, executor)
                executor.adopt(job, None)
            return bool(choices)
        if job.verb is Verb.UNLOAD:
            others = self._knowing(job.model)
            if others:
                others[0].adopt(job, None)
            return bool(others)
        known = done.residency.recall(job.model)
        if known is None:
            return False
        executor = self.routes.for_job(job, known)
        executor.adopt(job, known.unloaded() if executor.residency.recall(job.model) is None else None)
        return True


def preloaded(file: str, config: Config, ranks: Sequence[int]) -> list[list[Model]]:
    """The models to preload in each group, which have so many ``ranks``.

    Raises `ConfigError` for one that can't be, with the configuration's ``file``.
    """
    manifest = Manifest(config.models.readable, config.device)
    try:
        return [
            [manifest.describe(path, None, None, "auto", count) for path in config.models.preload] for count in ranks
        ]
    except TacodError as error:
        raise ConfigError(f"{file}:models.preload: {error.message}") from None
