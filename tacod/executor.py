"""Keeps the ranks at work: starts them, feeds them step by step, and replaces them when they are lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tacod.baselines import Baselines
from tacod.config import Config
from tacod.faults import Faults
from tacod.group import Answer, RankGroup, State
from tacod.manifest import Manifest, Model
from tacod.metrics import Metrics, StepTimes
from tacod.notify import notify
from tacod.processes import GroupLost
from tacod.restarts import RestartPolicy
from tacod.scheduler import Job, Outcome, Scheduler, Verb
from tacod.store import Store
from tacod_client.errors import ModelNotFound, OutOfMemory, TacodError, Unavailable

__all__ = ["Executor"]

log = logging.getLogger(__name__)


class Executor:
    """Scheduler and ranks, and what each needs of the other.

    ``on_progress`` hears of every step of a sampling job and of every stretch of a load, ``on_end`` once of every job's
    end, with the ranks' answer.
    """

    def __init__(
        self,
        config: Config,
        devices: list[str],
        preload: Iterable[Model],
        folder: Path,
        on_progress: Callable[[Job, dict[str, Any]], None],
        on_end: Callable[[Job, dict[str, Any]], None],
    ) -> None:
        self.config = config
        self.manifest = Manifest(config.models.readable, config.group.device)
        self.store = Store(config.limits.store_bytes)
        self.metrics = Metrics()
        self.baselines = Baselines()
        self.scheduler = Scheduler(config.limits.queue, config.group.retries)
        self.group = RankGroup(config.group, devices, folder)
        self._plan_faults(config)
        self.ready = False
        """Whether a forward has gone through all ranks and all preloaded models are there, since the daemon began."""
        self.given_up: str | None = None
        """Why the ranks are not started again, once that is so."""
        self._restarts = RestartPolicy(config.group.max_restarts, config.group.restart_window_s)
        self._on_progress = on_progress
        self._told: tuple[int, int] | None = None
        self._on_end = on_end
        self._spawn_at: float | None = time.monotonic()
        self._restore = list(preload)
        self._restoring: Model | None = None
        self._evicting: list[str] = []
        """The models that go with the running step: a load takes their place, or what they were made of is unloaded."""
        self._short: tuple[str, str] | None = None
        """The load that found no memory, and the model that goes when it is tried again."""
        self._step_ready_s: dict[str, float] = {}
        """When each started job's current or next step could have begun; a retry waits since then too."""
        self._queue_s = 0.0

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``degraded`` (the ranks are being replaced or were given up) or ``draining``."""
        if self.scheduler.draining:
            return "draining"
        if self.given_up is not None or (self.ready and self.group.state in (State.DOWN, State.STARTING)):
            return "degraded"
        return "ready" if self.ready else "starting"

    @property
    def loading(self) -> Model | None:
        """The model that the ranks load now, for a client or anew."""
        running = self.scheduler.running
        if running is not None and running.verb is Verb.LOAD:
            model: Model = running.body
            return model
        return self._restoring

    def go_by(self, config: Config, preload: Iterable[Model]) -> None:
        """Go by another configuration of the same ranks; models that are to be there from now on are loaded next."""
        if config.testing != self.config.testing:
            self._plan_faults(config)
        self.config = config
        self.group.settings = config.group
        self.manifest.roots = config.models.readable
        self.store.limit = config.limits.store_bytes
        self.scheduler.limit, self.scheduler.retries = config.limits.queue, config.group.retries
        self._restarts.limit, self._restarts.window_s = config.group.max_restarts, config.group.restart_window_s
        waiting = {model.id for model in self._restore}
        self._restore += [model for model in preload if model.id not in self.manifest and model.id not in waiting]

    def _plan_faults(self, config: Config) -> None:
        self.group.faults = Faults(config.testing) if config.testing is not None else None
        if config.testing is not None:
            log.warning("for tests alone: %d faults on purpose (testing.faults)", len(config.testing.faults))

    @property
    def wakes_at(self) -> list[float]:
        """The moments on the monotonic clock at which `attend` has something to do, whatever else happens."""
        return [moment for moment in (self.group.deadline, self._spawn_at) if moment is not None]

    def close(self) -> None:
        """End the ranks."""
        self.group.kill()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job; the tensors that it names by digest stay in the store until its end.

        Raises `Unavailable` and `QueueFull`.
        """
        if self.given_up is not None:
            raise Unavailable(self.given_up)
        self.scheduler.submit(job)
        self.store.pin(job.digests)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; returns whether that is done already. Raises `JobNotFound`."""
        ended = self.scheduler.cancel(job_id)
        self._end(ended)
        return bool(ended)

    def drop(self, session: bytes) -> None:
        """End what a session has queued."""
        self._end(self.scheduler.drop(session))

    def abort(self, error: TacodError) -> None:
        """End all jobs with ``error``, and the ranks with them."""
        self.group.kill()
        self._end(self.scheduler.fail_all(error))

    # --- ranks ----------------------------------------------------------------------------------------------------

    def attend(self) -> None:
        """Take in what the ranks have said, look after those that are gone or stuck, and hand out the next step."""
        now = time.monotonic()
        try:
            answer = self.group.receive()
            self._tell_load()
            if answer is not None:
                self._take(answer)
            self.group.check(now)
            if self.group.state is State.IDLE:
                self._dispatch()
        except GroupLost as lost:
            self._lose_group(lost, now)
        if self._spawn_at is not None and now >= self._spawn_at:
            self._spawn_at = None
            self.group.spawn()

    def _tell_load(self) -> None:
        """Pass on how far the running load is, if it got further."""
        job, progress = self.scheduler.running, self.group.progress
        if job is not None and job.verb is Verb.LOAD and progress is not None and progress != self._told:
            self._told = progress
            self._on_progress(job, {"done_bytes": progress[0], "total_bytes": progress[1]})

    @staticmethod
    def _progress(job: Job, sigma: float) -> dict[str, Any]:
        assert job.started_s is not None
        elapsed_s = time.monotonic() - job.started_s
        return {"job": job.id, "step": job.step, "total": job.steps, "sigma": sigma, "elapsed_s": elapsed_s}

    def _lose_group(self, lost: GroupLost, now: float) -> None:
        reason = str(lost)
        log.error("%s; ending all ranks", reason)
        running = self.scheduler.running
        if running is not None and running.verb in (Verb.FORWARD, Verb.SAMPLE):
            self.metrics.retried_forwards += 1
        self.group.kill()
        self._evicting, self._short = [], None
        self._end(self.scheduler.lose_group(reason, lost.error))
        restoring = self._restoring
        if restoring is not None and isinstance(lost.error, OutOfMemory):
            # New ranks would come to the same.
            log.error("%s can't be loaded: %s", restoring.path, lost.error.message)
            self._forget_model(restoring.id)
            restoring = None
        known = list(self.manifest)
        waiting = [*([restoring] if restoring else []), *self._restore]
        self._restore = known + [model for model in waiting if model.id not in self.manifest]
        self._restoring = None
        self._spawn_at = self._restarts.next_start(now)
        if self._spawn_at is not None:
            self.group.restarts += 1
            return
        limits = self.config.group
        self.given_up = (
            f"the ranks failed more than {limits.max_restarts} times in {limits.restart_window_s:g} s "
            f"(group.max_restarts); last: {reason}"
        )
        log.critical("%s", self.given_up)
        self._end(self.scheduler.fail_all(Unavailable(self.given_up)))

    def _dispatch(self) -> None:
        if self._restore:
            self._restoring = self._restore.pop(0)
            log.info("loading %s", self._restoring.path)
            stored = [self.store.get(digest) for digest in self._restoring.digests]
            self.group.run("load", self._restoring.work(), stored, self.config.group.load_timeout_s)
            return
        if not self.ready:
            self.ready = True
            log.info("ready with %d ranks", self.group.world_size)
            notify("READY=1")
        while (job := self.scheduler.next(time.monotonic())) is not None:
            if (job.verb is Verb.LOAD) != (job.model in self.manifest):
                self._start_step(job)
                return
            if job.verb is Verb.LOAD:
                # Another one that asked for it came first.
                ended = self.scheduler.finish_step()
                assert ended is not None
                self._end([ended])
                continue
            gone = ModelNotFound(f"model {job.model!r} was unloaded before its turn came; load it again")
            self._end([self.scheduler.fail_step(gone)])

    def _start_step(self, job: Job) -> None:
        self._queue_s = time.monotonic() - self._step_ready_s.get(job.id, job.submitted_s)
        group = self.config.group
        body, timeout_s = job.body, group.step_timeout_s
        short, self._short, self._evicting = self._short, None, []
        if job.verb is Verb.FORWARD:
            body = {**job.body, "session": job.session}
        elif job.verb is Verb.SAMPLE:
            body = {"job": job.id, "step": job.step, **(job.body if job.step == 0 else {})}
        elif job.verb is Verb.LOAD:
            timeout_s = group.load_timeout_s
            models = self.config.models
            self._evicting = self.manifest.to_evict(job.body, models.memory_bytes, models.variants)
            if not self._evicting and short is not None and short[0] == job.id and short[1] in self.manifest:
                self._evicting = [short[1]]
            body = job.body.work(self._evicting)
        elif job.verb is Verb.UNLOAD:
            self._evicting = self.manifest.patched(job.model)
            body = {**job.body, "evict_models": self._evicting}
        stored = [self.store.get(digest) for digest in job.digests] if job.step == 0 else []
        self.group.run(job.verb.value, body, stored, timeout_s)

    def _take(self, answer: Answer) -> None:
        if self._restoring is not None:
            self._take_restored(self._restoring, answer)
            self._restoring = None
            return
        job = self.scheduler.running
        assert job is not None
        for evicted in self._evicting:
            log.info("unloaded %s %s", evicted, "to make room" if job.verb is Verb.LOAD else "too")
            self._forget_model(evicted)
        self._evicting = []
        if answer.error is not None:
            self._take_error(job, answer.error)
            return
        if job.verb in (Verb.FORWARD, Verb.SAMPLE):
            self._note_step(job, answer)
        elif job.verb is Verb.LOAD:
            self._note_loaded(job.body, answer)
        else:
            self._forget_model(job.body["model"])
        ended = self.scheduler.finish_step()
        if job.verb is Verb.SAMPLE and job.outcome in (None, Outcome.RESULT):
            self._on_progress(job, self._progress(job, answer.body["sigma"]))
        if ended is None:
            self._step_ready_s[job.id] = time.monotonic()
        else:
            self._end([ended], answer.body)

    def _take_error(self, job: Job, error: TacodError) -> None:
        other = self.manifest.next_to_go(job.body) if job.verb is Verb.LOAD else None
        if other is not None and isinstance(error, OutOfMemory) and not job.cancelling:
            self._short = job.id, other.id
            self.scheduler.repeat_step()
        else:
            self._end([self.scheduler.fail_step(error)])

    def _take_restored(self, model: Model, answer: Answer) -> None:
        if answer.error is None:
            self._note_loaded(model, answer)
        else:
            log.error("%s can't be loaded: %s", model.path, answer.error.message)
            self._forget_model(model.id)

    def _note_loaded(self, model: Model, answer: Answer) -> None:
        self.metrics.loads.add(answer.elapsed_s)
        told = [(model, answer.body["model"])]
        if model.base is not None:
            told.insert(0, (model.base, answer.body["base"]))
        for each, facts in told:
            if each.id not in self.manifest:
                self.store.pin(each.digests)
                self.manifest.add(each.loaded(facts, answer.elapsed_s, self.group.world_size))

    def _forget_model(self, model_id: str) -> None:
        if model_id in self.manifest:
            self.store.unpin(self.manifest.find(model_id).digests)
            self.manifest.remove(model_id)
            self.scheduler.begin_anew(model_id)

    def _note_step(self, job: Job, answer: Answer) -> None:
        busy = answer.body["compute_s"] + answer.body["collective_s"]
        times = StepTimes(
            queue_s=self._queue_s,
            wire_s=max(answer.elapsed_s - busy, 0.0),
            compute_s=answer.body["compute_s"],
            collective_s=answer.body["collective_s"],
        )
        for name, seconds in vars(times).items():
            job.times[name] = job.times.get(name, 0.0) + seconds
        # A run that lost its ranks counts anew.
        job.skipped = answer.body["skipped"] + (job.skipped if job.step else 0)
        self.metrics.add_step(times, answer.body["forwards"], answer.body["ranks"], answer.body["skipped"])
        if job.verb is Verb.FORWARD and answer.body["ranks"] == 1 and not answer.body["skipped"]:
            self.baselines.note(self._kind_of(job), job.body["arguments"], times.compute_s)
        self.manifest.note_plan(job.model, answer.body["plan"])

    def single_rank_s(self, job: Job) -> float | None:
        """What a forward like this job's took on one rank, as far as one was seen."""
        return self.baselines.of(self._kind_of(job), job.body["arguments"]) if job.verb is Verb.FORWARD else None

    def _kind_of(self, job: Job) -> str:
        """The file and dtype: patches change no time."""
        if job.model not in self.manifest:
            return job.model
        model = self.manifest.find(job.model)
        return f"{model.path} {model.dtype}"

    def _end(self, jobs: Iterable[Job], answer: dict[str, Any] | None = None) -> None:
        """Every job passes here at its end, once."""
        for job in jobs:
            assert job.outcome is not None
            self.metrics.jobs_total[job.outcome.value] += 1
            self.store.unpin(job.digests)
            self._step_ready_s.pop(job.id, None)
            if job.verb is Verb.SAMPLE and job.outcome is not Outcome.RESULT:
                self.group.forget(job.id)
            self._on_end(job, answer or {})
