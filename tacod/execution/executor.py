"""Runs jobs on the ranks of a group: starts the ranks, gives them work step by step, and replaces lost ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tacod.config import Config
from tacod.execution.host import Host
from tacod.execution.manifest import Manifest, Model
from tacod.execution.paces import LONG_S
from tacod.execution.records import Records
from tacod.execution.residency import Residency
from tacod.execution.scheduler import ON_MODEL, Job, Outcome, Scheduler, Verb
from tacod.execution.work_item import Purpose, WorkItem
from tacod.group.faults import Faults
from tacod.group.group import Answer, GroupState, RankGroup
from tacod.group.ranks import GroupLost
from tacod.group.restarts import RestartPolicy
from tacod.group.work import Command, Evict, Forward, Loaded, MethodCall, SampleStep, Stepped, Unload
from tacod.observe.metrics import StepTimes
from tacod_client.errors import ModelError, ModelNotFound, OutOfMemory, TacodError, Unavailable

__all__ = ["Executor"]

log = logging.getLogger(__name__)

QUIET_S = 5.0
"""So long after the last job ranks may start anew to be more: a client that samples asks again before."""
BEHIND_S = 0.05
"""How far behind rank 0's completion the others' reports mostly are. So long the client's next forward waits for them,
even if other groups are free, which may round otherwise."""
LOOK_S = 0.01
"""How often jobs that are put off are checked again while the ranks are idle."""


class Executor:
    """Connects a group's scheduler with its ranks.

    ``on_progress`` is called for every step of a sampling job and for every progress of a load, ``on_end`` once at
    every job's end, with the result of its last step if it has one. ``pass_on`` says whether another group goes
    on with a job: with one that this group can't do any more, or with an unload that it has done.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        devices: list[str],
        preload: Iterable[Model],
        folder: Path,
        host: Host,
        on_progress: Callable[[Job, dict[str, Any]], None],
        on_end: Callable[[Executor, Job, Stepped | None], None],
        pass_on: Callable[[Executor, Job], bool] = lambda executor, job: False,
        beside: int = 0,
    ) -> None:
        """``beside`` is how many ranks other groups have on this host."""
        self.config = config
        self.name = name
        self.settings = config.group(name)
        self.manifest = Manifest(config.models.readable, config.device)
        self.store, self.memories, self._kept = host.store, host.memories, host.kept
        self.records = Records(self.manifest)
        self.scheduler = Scheduler(
            config.limits.queue, self.settings.retries, lambda: self.group.completed_s is not None
        )
        self.group = RankGroup(self.settings, devices, folder, config.comfyui.path, beside)
        self.memories.on_freed.append(self.group.unmap)
        self.residency = Residency(self.manifest, self.store, preload, len(devices), self._keep_for_turns)
        self._plan_faults(config)
        self.current: WorkItem | None = None
        """What the ranks are working on."""
        self.ready = False
        """Whether, since the daemon began, a forward has gone through all ranks and all preloaded models were loaded.
        """
        self.given_up: str | None = None
        """Why the ranks are not started again; None as long as they are."""
        self._restarts = RestartPolicy(self.settings.max_restarts, self.settings.restart_window_s)
        self._on_progress = on_progress
        self._on_end = on_end
        self._pass_on = pass_on
        self._spawn_at: float | None = time.monotonic()
        self._grow_at = 0.0
        """When the ranks may start anew to be more, if nobody has asked for anything until then."""
        self._look_at: float | None = None
        """When jobs that are put off are looked at again."""

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``degraded`` (the ranks are being replaced or were given up) or ``draining``."""
        if self.scheduler.draining:
            return "draining"
        if self.given_up is not None or (self.ready and self.group.state in (GroupState.DOWN, GroupState.STARTING)):
            return "degraded"
        return "ready" if self.ready else "starting"

    @property
    def _label(self) -> str:
        """What a message about the ranks begins with, if there are several groups."""
        return f"group {self.name}: " if len(self.config.groups) > 1 else ""

    @property
    def is_free(self) -> bool:
        """Whether the ranks could begin with another job now."""
        return self.group.state is GroupState.IDLE and not self.scheduler.jobs and not self.residency.coming

    @property
    def is_agreeing(self) -> bool:
        """Whether the ranks are about to be free: a forward was completed just now, and they have yet to report it."""
        return self._agrees_by is not None

    @property
    def _agrees_by(self) -> float | None:
        """Until when the ranks count as about to be free; None if they don't."""
        completed_s = self.group.completed_s
        if completed_s is None or time.monotonic() >= completed_s + BEHIND_S:
            return None
        return completed_s + BEHIND_S

    @property
    def loading(self) -> Model | None:
        """The model that the ranks are loading, for a client or after a restart."""
        return self.current.model if self.current is not None else None

    @property
    def files(self) -> set[str]:
        """The real paths of all files that are loaded, that will be loaded, or that jobs need."""
        jobs = self.scheduler.jobs
        needed = [*self.manifest, *self.residency.coming, *map(self._model_of, jobs)]
        return {path for model in needed if model is not None for path in model.file_paths}

    def apply_config(self, config: Config, preload: Iterable[Model]) -> None:
        """Apply another configuration of the same ranks; models that it adds to the preloaded ones are loaded next."""
        if config.testing != self.config.testing:
            self._plan_faults(config)
        if config.models.readable != self.config.models.readable:
            self.manifest.forget_evicted()
        self.config, self.settings = config, config.group(self.name)
        self.group.settings = self.settings
        self.manifest.roots = config.models.readable
        self.scheduler.limit, self.scheduler.retries = config.limits.queue, self.settings.retries
        self._restarts.limit, self._restarts.window_s = self.settings.max_restarts, self.settings.restart_window_s
        self.residency.want(preload)

    def _plan_faults(self, config: Config) -> None:
        self.group.faults = Faults(config.testing, self.name) if config.testing is not None else None
        if config.testing is not None:
            log.warning("for tests alone: %d faults on purpose (testing.faults)", len(config.testing.faults))

    @property
    def wakes_at(self) -> list[float]:
        """The moments on the monotonic clock at which `poll` has something to do, whatever else happens."""
        may_grow = self.group.may_grow and self.group.state is GroupState.IDLE and not self.scheduler.jobs
        grow_at = self._grow_at if may_grow else None
        moments = (self.group.deadline, self._spawn_at, self._look_at, self.group.look_at, self._agrees_by, grow_at)
        return [moment for moment in moments if moment is not None]

    def close(self) -> None:
        """End the ranks."""
        self.group.close()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def submit(self, job: Job, others: int = 0) -> None:
        """Queue a job; the tensors that it names by digest stay in the store until its end.

        If its model isn't loaded now, the tensors of that model's patches stay too. As many ``others``, jobs of other
        groups, count towards the limit. Raises `Unavailable` and `QueueFull`.
        """
        if self.given_up is not None:
            raise Unavailable(self.given_up)
        self.scheduler.submit(job, others)
        self.store.pin(job.digests, job.verb is not Verb.SAMPLE)
        self.memories.pin(job.body)
        self._keep_patches_of(job.model)

    def adopt(self, job: Job, model: Model | None) -> None:
        """Take over a job that another group had accepted; its tensors are pinned already.

        The ranks don't hold its ``model``, if it is given, and load it for the job's turn.
        """
        job.begin_anew()
        self.scheduler.adopt(job)
        if model is not None:
            self.manifest.remember(model)
        self._keep_patches_of(job.model)

    def _keep_patches_of(self, model_id: str) -> None:
        """If a model isn't loaded, keep in the store what jobs need to load it for their turns."""
        if model_id not in self.manifest and (model := self.residency.recall(model_id)) is not None:
            self._keep_for_turns(model)

    def _keep_for_turns(self, model: Model) -> None:
        """A model was evicted: keep in the store what waiting jobs need to load it for their turns."""
        for job in self.scheduler.jobs:
            waits = job.model == model.id and job.verb in ON_MODEL
            if waits and not job.restores and not self.store.lacks(model.digests):
                job.restores = model.digests
                self.store.pin(job.restores, job.verb is not Verb.SAMPLE)

    def _unpin_restores(self, job: Job) -> None:
        self.store.unpin(job.restores, job.verb is not Verb.SAMPLE)
        job.restores = []

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; returns whether it has ended already. Raises `JobNotFound`."""
        ended = self.scheduler.cancel(job_id)
        self._end(ended)
        self._stop_if_cancelling()
        return bool(ended)

    def drop(self, session: bytes) -> None:
        """End a session's jobs and its uploads, and take back the memory that it shares."""
        self.store.disclaim(session)
        self._end(self.scheduler.drop(session))
        self.memories.revoke(session)
        self._stop_if_cancelling()

    def _stop_if_cancelling(self) -> None:
        """If the running job is being cancelled, stop its forward, if that is long, or the sending of its file."""
        item = self.current
        if item is None or item.job is None or not item.job.cancelling:
            return
        if item.watched or (item.job.verb is Verb.LOAD and item.purpose is Purpose.STEP):
            self.group.stop()

    def abort(self, error: TacodError) -> None:
        """End all jobs with ``error``, and the ranks with them; one that is completed ends with its result."""
        self._kill_ranks()
        self.current = None
        self._end(self.scheduler.fail_all(error))

    def _kill_ranks(self) -> None:
        """End all ranks. If rank 0 has completed the running job, that ends with its result, as if all had answered."""
        answer = self.group.kill()
        if answer is not None:
            self._take(answer)

    # --- ranks ----------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take the ranks' reports, check for lost and stuck ranks, and hand out the next step."""
        now = time.monotonic()
        self._look_at = None
        try:
            answer = self.group.receive()
            self._report_load()
            self._report_blocks()
            if answer is not None:
                self._take(answer)
            self.group.check(now)
            if self.group.state is GroupState.IDLE and not self._renew_ranks(now):
                self._dispatch()
        except GroupLost as lost:
            self._lose_group(lost, now)
        if self._spawn_at is not None and now >= self._spawn_at:
            self._spawn_at = None
            self.group.spawn()

    def _report_load(self) -> None:
        """Report the progress of the running load, if there is any."""
        item, progress = self.current, self.group.progress
        if item is None or item.job is None or item.job.verb is not Verb.LOAD:
            return
        if progress is not None and progress != item.progress:
            item.progress = progress
            self._on_progress(item.job, {"done_bytes": progress.done, "total_bytes": progress.total})

    def _report_blocks(self) -> None:
        """Report how far a long forward is."""
        item, blocks = self.current, self.group.blocks
        if item is None or item.job is None or item.job.verb is not Verb.FORWARD or blocks in (None, item.blocks):
            return
        elapsed_s = time.monotonic() - item.began_s
        if elapsed_s < LONG_S:
            return
        assert blocks is not None
        item.blocks = blocks
        body = {"job": item.job.id, "block": blocks.done, "blocks": blocks.total, "elapsed_s": elapsed_s}
        self._on_progress(item.job, body)

    @staticmethod
    def _progress(job: Job, sigma: float | None) -> dict[str, Any]:
        assert job.started_s is not None
        elapsed_s = time.monotonic() - job.started_s
        return {"job": job.id, "step": job.step, "total": job.steps, "sigma": sigma, "elapsed_s": elapsed_s}

    def _lose_group(self, lost: GroupLost, now: float) -> None:
        reason = str(lost)
        log.error("%s%s; ending all ranks", self._label, reason)
        item = self.current
        self._kill_ranks()
        self.current = None
        job = item.job if item is not None else None
        restoring = item.model if item is not None and item.purpose is Purpose.RESTORE else None
        # Also if rank 0 had completed the job: the next one would lose the ranks again.
        shrunk = item is not None and self._shrink_after(item, lost)
        if shrunk:
            lost = GroupLost(reason)
        ended = self.scheduler.lose_group(reason, lost.error, lost.cause, counts=not shrunk)
        self._end(ended)
        given_up = self.residency.lose_group(lost, self.settings.retries, None if shrunk else restoring)
        at_fault = job.id if job is not None else f"restore {restoring.id}" if restoring is not None else ""
        self._spawn_at = self._restarts.next_start(now, at_fault)
        if self._spawn_at is not None:
            self.group.restarts += 1
            if shrunk or given_up or any(map(_is_at_fault, ended)):
                self._restarts.forgive(at_fault)
            self._count_retry(job)
            return
        limits = self.settings
        self.given_up = (
            f"{self._label}the ranks failed more than {limits.max_restarts} times in {limits.restart_window_s:g} s "
            f"(group.max_restarts); last: {reason}"
        )
        log.critical("%s", self.given_up)
        left = [job for job in self.scheduler.release_all() if not self._pass_on(self, job)]
        self._end([job.end(Outcome.FAILED, Unavailable(self.given_up)) for job in left])
        self._count_retry(job)

    def _count_retry(self, job: Job | None) -> None:
        """Count the job whose step was lost with the ranks, if it goes on."""
        if job is not None and job.verb in ON_MODEL and job.outcome is None:
            self.records.metrics.retried_forwards += 1

    def _shrink_after(self, item: WorkItem, lost: GroupLost) -> bool:
        """After one rank alone ran out of memory, have new ranks hold fewer blocks; returns whether they can."""
        model = item.model or (self._model_of(item.job) if item.job is not None else None)
        cancelling = item.job is not None and item.job.cancelling
        if model is None or cancelling or not isinstance(lost.error, OutOfMemory):
            return False
        if self.residency.shrink(model, lost.error):
            return True
        self.residency.regrow(model)
        return False

    def _renew_ranks(self, now: float) -> bool:
        """If new ranks would be more than there are, and nobody needs these now, start such; returns whether."""
        if not self.group.may_grow or self.scheduler.jobs or now < self._grow_at:
            return False
        log.info("the cluster has room for more ranks: all start anew")
        self.group.kill()
        self.residency.lose_group(GroupLost("for more ranks"), self.settings.retries, None)
        self.group.restarts += 1
        self._spawn_at = now
        return True

    def _dispatch(self) -> None:
        self.residency.resize(self.group.world_size)
        model = self.residency.restore_next()
        if model is not None:
            self._load(Purpose.RESTORE, model, first=self.residency.in_the_way(model))
            return
        if not self.ready:
            self.ready = True
            log.info("%sready with %d ranks", self._label, self.group.world_size)
        while (job := self.scheduler.next(time.monotonic(), self._is_put_off)) is not None:
            if (job.verb is Verb.LOAD) != (job.model in self.manifest):
                self._start_step(job)
                return
            model = self.residency.recall(job.model)
            if job.verb is Verb.LOAD or (job.verb is Verb.UNLOAD and model is not None):
                # Another one that asked for the model came first, or it has made room.
                if job.verb is Verb.UNLOAD:
                    self.residency.forget(job.model)
                ended = self.scheduler.finish_step()
                assert ended is not None
                self._end([ended])
                continue
            if model is not None:
                self._load(Purpose.FETCH, model, job)
                return
            gone = ModelNotFound(f"model {job.model!r} was unloaded before its turn came; load it again")
            self._end([self.scheduler.fail_step(gone)])
        if len(self.scheduler):
            self._look_at = time.monotonic() + LOOK_S

    def _model_of(self, job: Job) -> Model | None:
        """The model that a job loads, or computes with; None if clients have to load that again."""
        return job.body if isinstance(job.body, Model) else self.residency.recall(job.model)

    def _is_put_off(self, job: Job) -> bool:
        """Whether a job waits for others' jobs.

        An unload waits for the runs that it would break off, and runs that have not begun wait for such an unload, or
        there might always be one. A job also waits for those who use what would make room for its model; see
        `Residency.is_put_off`.
        """
        if job.verb is Verb.UNLOAD:
            return any(self._breaks_off(job, each) for each in self.scheduler.jobs if each.started_s is not None)
        if job.verb is Verb.SAMPLE and job.started_s is None:
            unloads = (each for each in self.scheduler.heads if each.verb is Verb.UNLOAD)
            if any(self._breaks_off(each, job) and self._is_put_off(each) for each in unloads):
                return True
        model = self._model_of(job)
        if model is None or job.model in self.manifest:
            return False
        others = [each.model for each in self.scheduler.jobs if each.session != job.session]
        return self.residency.is_put_off(model, job.session, self.config.models, others, time.monotonic())

    def _breaks_off(self, unload: Job, job: Job) -> bool:
        """Whether an unload would take the model from another session's run, or what that is patched on."""
        if job.verb is not Verb.SAMPLE or job.session == unload.session:
            return False
        model = self._model_of(job)
        return unload.model == job.model or (
            model is not None and model.base is not None and unload.model == model.base.id
        )

    @property
    def _needed(self) -> list[str]:
        """The models of all jobs, in the order of their turns."""
        return [job.model for job in self.scheduler.jobs]

    def _hand_out(self, item: WorkItem) -> None:
        self.current, item.began_s = item, time.monotonic()
        memory = self.memories.named_by(item.command)
        completes = memory is not None and memory.channel is not None
        request = item.job.request if completes and item.job is not None else None
        self.group.run(item.command, map(self.store.get, item.digests), item.timeout_s, item.watched, memory, request)

    def _load(self, purpose: Purpose, model: Model, job: Job | None = None, first: Iterable[str] = ()) -> None:
        """Load a model, in the place of others if it is for a job: of the ``first`` ones in any case."""
        evicts = [*first]
        if job is not None:
            evicts = self.residency.make_room(model, self.config.models, self._needed, (*evicts, job.evict_next))
            job.evict_next = ""
        timeout_s = self.settings.load_timeout_s
        room = self.residency.room_for(model, self.config.models, evicts)
        load = model.load(evicts, room, self.residency.fewer(model), self.settings.asked_shares)
        load = replace(load, roots=list(self.manifest.roots))
        self._hand_out(WorkItem(purpose, load, timeout_s, job, model, evicts, model.digests))

    def _start_step(self, job: Job) -> None:
        if isinstance(job.body, Model):
            self._load(Purpose.STEP, job.body, job)
            return
        command: Command
        evicts: list[str] = []
        if isinstance(job.body, Unload):
            evicts = self.manifest.patched(job.model)
            command = Unload(job.model, evicts)
        elif isinstance(job.body, Forward | MethodCall):
            command = job.body
        else:
            if job.begins:
                # Some of its steps may have made way meanwhile.
                job.begin_anew()
            # With their bytes: the ranks need them once, and would keep what they are sent by digest.
            record = list(map(self.store.get, job.record)) if job.begins else []
            command = SampleStep(job.id, job.step, job.body if job.begins else None, record)
        item = WorkItem(Purpose.STEP, command, self.settings.step_timeout_s, job, evicts=evicts)
        item.digests = job.digests if job.begins else []
        item.watched = self.records.may_be_long(job)
        item.queue_s = time.monotonic() - (job.submitted_s if job.ready_s is None else job.ready_s)
        self._hand_out(item)

    def _take(self, answer: Answer) -> None:
        item, self.current = self.current, None
        assert item is not None
        now = time.monotonic()
        job = item.job
        if job is None:
            assert item.model is not None
            self.residency.note_evicted(item.evicts)
            if isinstance(answer.error, OutOfMemory) and self.residency.shrink(item.model, answer.error):
                self.residency.load_anew(item.model)
                return
            if answer.error is None:
                self.records.metrics.loads.observe(answer.elapsed_s)
            self.residency.note_restored(item.model, answer.error or _loaded(answer), answer.elapsed_s, now)
            return
        if item.purpose is not Purpose.STEP:
            self._take_for_turn(item, job, answer)
            return
        if item.model is not None:
            self.residency.note_evicted(item.evicts)
        if answer.error is not None:
            self._take_error(item, job, answer.error)
            return
        step: Stepped | None = None
        times: StepTimes | None = None
        if item.model is not None:
            self._note_loaded(job, item.model, answer)
        elif job.verb is Verb.UNLOAD:
            self.residency.note_unloaded([*item.evicts, job.model])
        else:
            step, times = self.records.read_step(job, answer, item.queue_s)
            self._kept.keep(job, step)
            self.residency.note_used(job.model, job.session, now)
        ended = self.scheduler.finish_step()
        if job.verb is Verb.SAMPLE and step is not None and job.outcome in (None, Outcome.RESULT):
            self._on_progress(job, self._progress(job, step.sigma))
        if ended is None:
            job.ready_s = time.monotonic()
        else:
            self._end([ended], step)
        if step is not None and times is not None:
            # Nobody waits for this.
            self.records.note_step(job, answer, step, times)

    def _note_loaded(self, job: Job, model: Model, answer: Answer) -> None:
        self.records.metrics.loads.observe(answer.elapsed_s)
        now = time.monotonic()
        self.residency.note_loaded(model, _loaded(answer), answer.elapsed_s, now)
        self.residency.note_used(model.id, job.session, now)

    def _take_for_turn(self, item: WorkItem, job: Job, answer: Answer) -> None:
        """The ranks have loaded, or evicted, what the running job's step needs: start the step."""
        self.residency.note_evicted(item.evicts)
        if answer.error is not None:
            self._take_error(item, job, answer.error)
            return
        if item.model is not None:
            self._note_loaded(job, item.model, answer)
            self._unpin_restores(job)
        if job.cancelling:
            self._end([self.scheduler.fail_step(Unavailable("cancelled"))])
        elif job.verb in ON_MODEL and job.model not in self.manifest:
            info = (
                f"model {job.model!r} is to hold fewer blocks, for want of memory, and its patches are stored no more"
            )
            self._end([self.scheduler.fail_step(ModelNotFound(f"{info}; load it again", model=job.model))])
        else:
            self._start_step(job)

    def _take_error(self, item: WorkItem, job: Job, error: TacodError) -> None:
        if isinstance(error, OutOfMemory) and not job.cancelling and self._find_memory(item, job, error):
            return
        if item.model is not None and item.purpose is Purpose.FETCH:
            self.residency.forget(item.model.id)
            if isinstance(error, ModelError):
                # Its client knows how to go on from that.
                info = f"model {item.model.id!r} made room for others, and can't be loaded again: {error.message}"
                error = ModelNotFound(f"{info}; load it again", model=item.model.id)
        self._end([self.scheduler.fail_step(error)])

    def _find_memory(self, item: WorkItem, job: Job, error: OutOfMemory) -> bool:
        """For a load or a step that found no memory, make some and try again; returns whether that can be done.

        First models are evicted: any for a load, patched ones for a step. Then the ranks hold fewer blocks.
        """
        if item.model is not None:
            other = self.manifest.next_to_go(item.model, needed=self._needed)
            if other is None and not self.residency.shrink(item.model, error):
                self.residency.regrow(item.model)
                return False
            if other is None:
                # It holds fewer blocks only if it is loaded anew.
                other = item.model.base
            job.evict_next = "" if other is None else other.id
            self.scheduler.repeat_step()
            return True
        if job.verb not in ON_MODEL:
            return False
        cleared = self.residency.clear_for(job.model, self._needed)
        model = self.manifest.find(job.model)
        if cleared is None and not self.residency.shrink(model, error):
            self.residency.regrow(model)
            return False
        if job.verb is Verb.SAMPLE:
            # The run ended with the step that failed.
            self.group.forget(job.id)
            job.begin_anew()
        if cleared is None:
            # Without its patches the model can't be loaded now, and its client does it.
            known = model if model.base is None or not self.store.lacks(model.digests) else model.base
            self._load(Purpose.FETCH, known, job, self.residency.sharing(model))
        else:
            evict = Evict([cleared.id])
            self._hand_out(WorkItem(Purpose.CLEAR, evict, self.settings.step_timeout_s, job, evicts=evict.models))
        return True

    def _end(self, jobs: Iterable[Job], step: Stepped | None = None) -> None:
        """Every job passes here at its end, once."""
        for job in jobs:
            assert job.outcome is not None
            self._grow_at = time.monotonic() + QUIET_S
            if job.verb is Verb.UNLOAD and job.outcome is Outcome.RESULT and self._pass_on(self, job):
                continue
            self.records.metrics.jobs_total[job.outcome.value] += 1
            self.store.unpin(job.digests, job.verb is not Verb.SAMPLE)
            self.memories.unpin(job.body)
            self._unpin_restores(job)
            self._kept.drop(job)
            if job.verb is Verb.SAMPLE and job.outcome is not Outcome.RESULT and job.started_s is not None:
                # Of others the ranks know nothing, and they may be many before the next command.
                self.group.forget(job.id)
            self._on_end(self, job, step)


def _loaded(answer: Answer) -> Loaded:
    assert answer.done is not None
    assert isinstance(answer.done.result, Loaded)
    return answer.done.result


def _is_at_fault(job: Job) -> bool:
    """Whether a job caused the loss of the ranks that ended it.

    That is so if new ranks had passed their self-test in between, or if it needed more memory than there is.
    """
    return job.outcome is Outcome.FAILED and (job.attempts > 1 or isinstance(job.error, OutOfMemory))
