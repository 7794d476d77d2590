"""Which group a session's loads and jobs go to.

A session has a *home* for each model: the group that loaded it for this session, whose ranks have its prefixes and CUDA
graphs. Patched models are at home where their base is. A job goes home if the ranks there are free, else to free ranks
that hold the model, else it waits at home. Free ranks take jobs that wait elsewhere, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from tacod.execution.executor import Executor
from tacod.execution.manifest import Model
from tacod.execution.scheduler import ON_MODEL, Job
from tacod.group.work import Forward, Sample
from tacod.plan import check_fits, parse_request
from tacod_client.errors import ArgumentError

__all__ = ["Routes", "fits"]

HELD, BASE_HELD, HAS_ROOM, FULL = range(4)
"""What it costs a group to have a model: nothing, a merge of patches, a load, or a load in the place of others."""


class Routes:
    """Knows the sessions' homes, and chooses between the groups that are not given up."""

    def __init__(self, executors: Sequence[Executor]) -> None:
        self._executors = executors
        self._homes: dict[bytes, dict[str, Executor]] = {}
        """By session, then by the id of the model without patches."""

    @property
    def live(self) -> list[Executor]:
        """The groups whose ranks run, or will run again."""
        return [each for each in self._executors if each.given_up is None]

    def settle(self, session: bytes, model: Model, executor: Executor) -> None:
        """A model is at home there from now on."""
        self._homes.setdefault(session, {})[_plain(model)] = executor

    def forget(self, session: bytes) -> None:
        """A session has ended."""
        self._homes.pop(session, None)

    def for_load(self, session: bytes, choices: Sequence[tuple[Executor, Model]]) -> tuple[Executor, Model]:
        """The group that loads a model for a session; each of the ``choices`` has the model as it is there.

        That is its home, if the model or its base is there; else the group with the fewest other sessions, of these the
        one to which it costs least, of these the one with the fewest jobs.
        """
        for executor, model in choices:
            if executor is self._home(session, model) and _cost(executor, model) <= BASE_HELD:
                return executor, model

        def order(choice: tuple[Executor, Model]) -> tuple[int, ...]:
            executor, model = choice
            return self._others(session, executor), _cost(executor, model), len(executor.scheduler.jobs)

        return min(choices, key=order)

    def for_job(self, job: Job, model: Model) -> Executor:
        """The group that gets a job which computes with a ``model``; at least one group is live."""
        fit = [each for each in self.live if fits(job, each)]
        # A plan that no group can do is refused by the ranks.
        choices = fit or self.live
        home = self._home(job.session, model)
        if home not in choices or home.residency.recall(model.id) is None:
            home = min(
                choices,
                key=lambda each: (_cost(each, model), self._others(job.session, each), len(each.scheduler.jobs)),
            )
            self.settle(job.session, model, home)
        is_free = home.is_free or (home.is_agreeing and not home.scheduler.unfinished)
        if (is_free and model.id in home.manifest) or _stays(job):
            return home
        free = [each for each in choices if each.is_free and model.id in each.manifest]
        return min(free, key=lambda each: self._others(job.session, each), default=home)

    def waiting_for(self, free: Executor) -> tuple[Executor, Job] | None:
        """The first job that waits in another group and that these ``free`` ranks could begin, or None."""
        for executor in self._executors:
            if executor is free or (executor.is_agreeing and len(executor.scheduler.unfinished) == 1):
                continue
            for job in executor.scheduler.jobs:
                if job.started_s is None and not _stays(job) and job.model in free.manifest and fits(job, free):
                    return executor, job
        return None

    def _home(self, session: bytes, model: Model) -> Executor | None:
        return self._homes.get(session, {}).get(_plain(model))

    def _others(self, session: bytes, executor: Executor) -> int:
        """How many other sessions have a model at home there."""
        return sum(executor in homes.values() for other, homes in self._homes.items() if other != session)


def _plain(model: Model) -> str:
    return model.id if model.base is None else model.base.id


def _cost(executor: Executor, model: Model) -> int:
    if model.id in executor.manifest:
        return HELD
    if _plain(model) in executor.manifest:
        return BASE_HELD
    return HAS_ROOM if executor.residency.has_room(model, executor.config.models) else FULL


def _stays(job: Job) -> bool:
    """Whether a job begins in no other group: loads and unloads are of one, and step caches go on from step to step."""
    plan = job.body.plan if isinstance(job.body, Forward) else None
    return job.verb not in ON_MODEL or (isinstance(plan, dict) and bool(plan.get("step_cache")))


def fits(job: Job, executor: Executor) -> bool:
    """Whether a group has enough ranks for what a job asks for."""
    ranks = executor.group.world_size
    with suppress(ArgumentError):
        if isinstance(job.body, Model):
            check_fits(job.body.asked, ranks)
        elif isinstance(job.body, Forward | Sample):
            parse_request(job.body.plan, ranks)
        return True
    return False
