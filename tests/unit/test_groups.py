"""Several groups of ranks: which one gets a load or a job, and what becomes of jobs when groups fail.

The ranks are fakes. One group alone is in `test_executor`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tacod.config import Config
from tacod.execution.executor import BEHIND_S, Executor
from tacod.execution.groups import Groups
from tacod.execution.manifest import Manifest, Model
from tacod.execution.scheduler import ON_MODEL, Job, Outcome, Verb
from tacod.group import board as board_module
from tacod.group.group import GroupState
from tacod.group.work import Forward, Stepped, Unload
from tacod.plan import parse_request
from tacod_client.errors import ArgumentError, JobNotFound, ModelNotFound, QueueFull, Unavailable
from tacod_client.wire import Tensor

from .fake_ranks import FACTS, FakeRank, body_of, fakes, step

RANKS = {"small": 1, "large": 2}
LIMIT = 5
TIMES = {"compute_s": 0.0, "collective_s": 0.0}
CONFIG = Config.model_validate(
    {
        "group": [
            {"name": name, "device": "cpu", "ranks": ranks, "max_restarts": 2, "retries": 1, "step_timeout_s": 1000.0}
            for name, ranks in RANKS.items()
        ],
        "limits": {"queue": LIMIT},
    }
)
M, N = (Model(name, f"/models/{name}", name, None) for name in "mn")
PATCHED = Model("m+", "/models/m", "m", None, patches=[{"path": "/models/l", "strength": 1.0}], base=M)
MODELS = {model.id: model for model in (M, N, PATCHED)}


class Host:
    """Two groups, of one rank and of two, their ranks and their clients' jobs."""

    def __init__(self, preload: tuple[Model, ...] = ()) -> None:
        self.stack = ExitStack()
        self.clock = self.stack.enter_context(fakes())
        self.folder = Path(tempfile.mkdtemp(prefix="tacod-"))
        self.stack.callback(shutil.rmtree, self.folder)
        self.ended: list[tuple[Job, str]] = []
        """Each with the group in which it has ended."""
        devices = [[f"cpu:{index}" for index in range(ranks)] for ranks in RANKS.values()]
        self.groups = Groups(CONFIG, devices, [preload, preload], self.folder, lambda *told: None, self.on_end)
        self.stack.callback(self.groups.close)
        self.small, self.large = self.groups.executors
        self.submitted: list[Job] = []
        self.groups.poll()

    def on_end(self, executor: Executor, job: Job, step: Stepped | None) -> None:
        assert all(job.id != each.id for each, _ in self.ended), "a job ended twice"
        assert (job.error is None) == (job.outcome is Outcome.RESULT)
        self.ended.append((job, executor.name))

    def ranks(self, executor: Executor) -> list[FakeRank]:
        return [rank.process for rank in executor.group.ranks]  # type: ignore[misc]

    def all_ready(self) -> None:
        for executor in self.groups:
            for rank in self.ranks(executor):
                rank.greet()
        self.groups.poll()

    def answer(self, executor: Executor, kind: str = "done", body: dict[str, Any] | None = None) -> None:
        """Have a group's ranks answer what they were given."""
        for rank in self.ranks(executor):
            for work in rank.unanswered[:1]:
                told = {
                    "load": {"model": FACTS, "base": FACTS, **TIMES},
                    "sample": step(len(self.ranks(executor)), sigma=1.0),
                }
                told |= {"forward": step(1), "call": {**step(1), "forwards": 0}}
                rank.answer(kind, told.get(work.type, TIMES) if body is None else body)
        self.groups.poll()

    def load(self, session: bytes, model: Model, plan: Any = "auto") -> Executor:
        """What the verb does: a job, unless the group has the model."""

        def describe(manifest: Manifest, ranks: int) -> Model:
            return replace(model, asked=parse_request(plan, ranks))

        executor, found = self.groups.place(session, describe)
        if found.id not in executor.manifest:
            self.submit(session, Verb.LOAD, found, executor=executor)
        return executor

    def loaded(self, session: bytes, model: Model, plan: Any = "auto") -> Executor:
        executor = self.load(session, model, plan)
        self.answer(executor)
        assert model.id in executor.manifest
        return executor

    def submit(
        self,
        session: bytes,
        verb: Verb,
        model: Model,
        steps: int = 1,
        plan: Any = "auto",
        executor: Executor | None = None,
    ) -> Job:
        body = body_of(verb, model)
        if isinstance(body, Unload):
            body = Unload(model.id)
        elif isinstance(body, Forward):
            body = replace(body, plan=plan)
        job = Job(str(len(self.submitted)), session, 0, verb, model.id, body, steps)
        self.groups.submit(job, executor)
        self.submitted.append(job)
        self.groups.poll()
        return job

    @property
    def held(self) -> list[set[str]]:
        """The models of each group."""
        return [{model.id for model in each.manifest} for each in self.groups]

    def where(self, job: Job) -> Executor | None:
        """The group that has a job now."""
        found = [each for each in self.groups if any(job.id == known.id for known in each.scheduler.jobs)]
        assert len(found) <= 1, "a job is in two groups"
        return found[0] if found else None

    def lose(self, executor: Executor) -> None:
        """A group's rank is killed, and new ones come if they may."""
        self.ranks(executor)[0].die(-9)
        self.groups.poll()
        self.clock.now += 100.0
        self.groups.poll()

    def give_up(self, executor: Executor) -> None:
        for _ in range(10):
            if executor.given_up is None:
                self.lose(executor)
        self.groups.poll()
        assert executor.given_up is not None


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.all_ready()
    with host.stack:
        yield host


# --- loads ------------------------------------------------------------------------------------------------------------


def test_two_clients_with_one_model_get_two_groups(host: Host) -> None:
    first = host.loaded(b"a", M)
    assert host.loaded(b"a", M) is first, "the session's own"
    second = host.loaded(b"b", M)
    assert second is not first
    assert host.load(b"a", M) is first
    assert host.load(b"b", M) is second


def test_a_client_that_is_gone_leaves_its_group_to_others(host: Host) -> None:
    first = host.loaded(b"a", M)
    host.groups.drop(b"a")
    assert host.load(b"b", M) is first
    assert host.submitted[-1].session == b"a", "nothing is loaded a second time"


def test_of_unused_groups_the_one_without_work_gets_another_model(host: Host) -> None:
    first = host.loaded(b"a", M)
    host.submit(b"a", Verb.FORWARD, M)
    assert host.load(b"a", N) is not first


def test_a_patched_model_goes_where_its_base_is(host: Host) -> None:
    first = host.loaded(b"a", M)
    host.submit(b"a", Verb.FORWARD, M)
    assert host.load(b"a", PATCHED) is first
    # Without a base anywhere it is as any other model.
    assert host.load(b"b", PATCHED) is not first


def test_a_plan_goes_where_there_are_enough_ranks(host: Host) -> None:
    both = {"sequence_parallel_degree": 2}
    assert host.loaded(b"a", M, both) is host.large
    # Though another session is there.
    assert host.load(b"b", M, both) is host.large
    assert host.loaded(b"c", M) is host.small
    job = host.submit(b"c", Verb.FORWARD, M, plan=both)
    assert host.where(job) is host.large
    with pytest.raises(ArgumentError, match="takes 3 ranks"):
        host.load(b"a", M, {"sequence_parallel_degree": 3})


# --- jobs -------------------------------------------------------------------------------------------------------------


def both_hold(host: Host, model: Model = M) -> None:
    """Session a has the small group for its home, session b the large one."""
    assert host.loaded(b"a", model) is host.small
    assert host.loaded(b"b", model) is host.large


def test_a_job_goes_home_or_to_free_ranks_or_waits_at_home(host: Host) -> None:
    both_hold(host)
    at_home, elsewhere, waits = (host.submit(b"a", Verb.FORWARD, M) for _ in range(3))
    assert [host.where(job) for job in (at_home, elsewhere, waits)] == [host.small, host.large, host.small]
    host.answer(host.small)
    assert host.small.scheduler.running is waits


def test_a_forward_waits_at_home_for_ranks_that_are_to_agree(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client has the last one's result. Another group, with another number of ranks, might round otherwise."""
    monkeypatch.setattr(board_module, "time", SimpleNamespace(monotonic_ns=lambda: int(host.clock.now * 1e9)))
    both_hold(host)
    host.submit(b"b", Verb.FORWARD, M)
    assert host.ranks(host.large)[0].complete()
    following = host.submit(b"b", Verb.FORWARD, M)
    assert host.where(following) is host.large
    assert host.where(host.submit(b"b", Verb.FORWARD, M)) is host.small, "it is not the next one"
    host.answer(host.small)
    assert host.where(following) is host.large
    ends_at = host.clock.now + BEHIND_S
    assert min(host.groups.wakes_at) == pytest.approx(ends_at), "nothing else may happen"
    host.clock.now = ends_at + 1e-6
    assert all(moment > host.clock.now for moment in host.groups.wakes_at), "it isn't looked at for ever"
    host.groups.poll()
    assert host.where(following) is host.small, "a rank hangs"


def test_free_ranks_take_what_waits_elsewhere(host: Host) -> None:
    both_hold(host)
    host.submit(b"b", Verb.FORWARD, M)
    jobs = [host.submit(b"a", Verb.SAMPLE, M, steps=2) for _ in range(2)]
    assert [host.where(job) for job in jobs] == [host.small, host.small]
    host.answer(host.large)
    assert host.large.scheduler.running is jobs[1]
    # What has begun stays.
    third = host.submit(b"b", Verb.FORWARD, M)
    host.answer(host.small)
    assert (host.where(jobs[0]), host.where(third)) == (host.small, host.large)


def test_free_ranks_take_nothing_whose_model_they_lack(host: Host) -> None:
    assert host.loaded(b"a", M) is host.small
    jobs = [host.submit(b"a", Verb.FORWARD, M) for _ in range(2)]
    assert [host.where(job) for job in jobs] == [host.small, host.small]


def test_forwards_with_a_step_cache_stay_together(host: Host) -> None:
    both_hold(host)
    jobs = [host.submit(b"a", Verb.FORWARD, M, plan={"step_cache": 0.1}) for _ in range(2)]
    assert [host.where(job) for job in jobs] == [host.small, host.small]


def test_a_session_that_has_loaded_nothing_uses_what_there_is(host: Host) -> None:
    assert host.loaded(b"a", M) is host.small
    host.submit(b"a", Verb.FORWARD, M)
    assert host.where(host.submit(b"b", Verb.FORWARD, M)) is host.small
    with pytest.raises(ModelNotFound):
        host.submit(b"b", Verb.FORWARD, N)


def test_the_queue_has_its_limit_over_all_groups(host: Host) -> None:
    both_hold(host)
    for session in (b"a", b"b", b"a", b"b", b"a"):
        host.submit(session, Verb.SAMPLE, M, steps=2)
    with pytest.raises(QueueFull, match=f"{LIMIT} jobs are queued"):
        host.submit(b"b", Verb.FORWARD, M)


def test_cancel_and_drop_find_jobs_in_any_group(host: Host) -> None:
    both_hold(host)
    jobs = [host.submit(b"a", Verb.SAMPLE, M, steps=5) for _ in range(4)]
    assert host.groups.cancel(jobs[3].id)
    assert not host.groups.cancel(jobs[1].id)
    host.groups.drop(b"a")
    for executor in host.groups:
        host.answer(executor)
    assert {job.outcome for job in jobs} == {Outcome.CANCELLED}
    with pytest.raises(JobNotFound):
        host.groups.cancel(jobs[0].id)


def test_unload_is_of_all_groups_and_told_once(host: Host) -> None:
    both_hold(host)
    assert host.loaded(b"b", PATCHED) is host.large
    work = host.submit(b"b", Verb.SAMPLE, M, steps=1)
    unload = host.submit(b"c", Verb.UNLOAD, M)
    assert host.where(unload) is host.small
    host.answer(host.small)
    assert host.where(unload) is host.large, "it waits for its turn there"
    host.answer(host.large)
    assert work.outcome is Outcome.RESULT
    host.answer(host.large)
    assert host.held == [set(), set()]
    assert [(job.id, job.outcome) for job, _ in host.ended if job.verb is Verb.UNLOAD] == [(unload.id, Outcome.RESULT)]
    assert sum(each.records.metrics.jobs_total["result"] for each in host.groups) == len(host.submitted)
    with pytest.raises(ModelNotFound):
        host.groups.check_model("m")


def test_preloaded_models_are_in_all_groups() -> None:
    host = Host((M, N))
    with host.stack:
        assert not host.groups.ready
        host.all_ready()
        for _ in range(2):
            assert host.groups.state == "starting"
            for executor in host.groups:
                host.answer(executor)
        assert (host.groups.ready, host.groups.state) == (True, "ready")
        assert host.held == [{"m", "n"}] * 2


def test_a_memory_is_unmapped_in_each_group_that_has_it(host: Host) -> None:
    both_hold(host)
    memory = host.groups.host.memories.make(b"a", 4096)
    for _ in range(2):
        host.submit(b"a", Verb.FORWARD, M)
    for executor in host.groups:
        executor.group._mapped.add(memory.id)
        host.answer(executor)
    host.groups.drop(b"a")
    assert [executor.group._unmapped for executor in host.groups] == [[memory.id]] * 2


# --- lost groups ------------------------------------------------------------------------------------------------------


def test_a_lost_group_repeats_its_work_and_others_go_on(host: Host) -> None:
    both_hold(host)
    lost, undisturbed = host.submit(b"a", Verb.SAMPLE, M, steps=3), host.submit(b"b", Verb.SAMPLE, M, steps=2)
    host.answer(host.small)
    host.answer(host.large)
    pids = [rank.pid for rank in host.ranks(host.large)]
    host.lose(host.small)
    assert (host.groups.state, host.small.state, host.large.state) == ("degraded", "degraded", "ready")
    host.answer(host.large)
    assert undisturbed.outcome is Outcome.RESULT
    assert host.where(lost) is host.small, "a run stays, though others are free"
    host.all_ready()
    for _ in range(4):
        host.answer(host.small)
    assert (lost.outcome, lost.attempts, undisturbed.attempts) == (Outcome.RESULT, 2, 1)
    assert [rank.pid for rank in host.ranks(host.large)] == pids
    assert (host.groups.state, host.groups.restarts) == ("ready", 1)


def test_jobs_of_a_group_that_is_given_up_go_to_others(host: Host) -> None:
    both_hold(host)
    assert host.loaded(b"a", N) is host.small
    jobs = [host.submit(b"a", Verb.SAMPLE, N, steps=2), host.submit(b"a", Verb.UNLOAD, N)]
    host.give_up(host.small)
    assert {host.where(job) for job in jobs} == {host.large}
    assert (host.groups.given_up, host.groups.state) == (None, "degraded")
    for _ in range(6):
        host.answer(host.large)
    assert [job.outcome for job in jobs] == [Outcome.RESULT] * 2
    assert not list(host.small.manifest)
    assert host.load(b"c", M) is host.large


def test_what_wants_more_ranks_than_are_left_is_told_so(host: Host) -> None:
    both = {"sequence_parallel_degree": 2}
    assert host.loaded(b"a", N, both) is host.large
    assert host.load(b"a", M, both) is host.large
    host.give_up(host.large)
    (load,) = (job for job in host.submitted if job.model == "m")
    assert isinstance(load.error, Unavailable)
    with pytest.raises(ArgumentError, match="takes 2 ranks"):
        host.load(b"a", N, both)
    # A model that was loaded with such a plan has another one there.
    job = host.submit(b"a", Verb.FORWARD, N)
    for _ in range(2):
        host.answer(host.small)
    assert (job.outcome, host.held) == (Outcome.RESULT, [{"n"}, set()])


def test_models_of_a_group_that_is_given_up_are_known_to_others(host: Host) -> None:
    assert host.loaded(b"a", M) is host.small
    host.give_up(host.small)
    job = host.submit(b"a", Verb.FORWARD, M)
    assert host.where(job) is host.large
    for _ in range(2):
        host.answer(host.large)
    assert job.outcome is Outcome.RESULT
    assert host.held == [set(), {"m"}]


def test_a_job_that_goes_to_another_group_keeps_what_its_model_needs_there(host: Host) -> None:
    store = host.groups.host.store
    patch = Tensor("U8", (8,), (b"12345678",)).with_digest()
    store.put_all([patch], b"a", host.clock.now)
    patched = replace(PATCHED, patches=[{"diff": patch.without_bytes()}])
    assert host.loaded(b"a", patched) is host.small
    # Large had it before, and it made room there.
    host.large.manifest.remember(patched.unloaded())
    job = host.submit(b"a", Verb.SAMPLE, patched, steps=2)
    assert host.where(job) is host.small
    host.give_up(host.small)
    assert host.where(job) is host.large
    store.limit = patch.nbytes
    with pytest.raises(QueueFull):
        store.put_all([Tensor("U8", (8,), (b"87654321",)).with_digest()], b"b", host.clock.now)
    for _ in range(4):
        host.answer(host.large)
    assert job.outcome is Outcome.RESULT
    assert not store._pins


def test_when_all_are_given_up_work_is_refused(host: Host) -> None:
    both_hold(host)
    job = host.submit(b"a", Verb.FORWARD, M)
    for executor in (host.large, host.small):
        host.give_up(executor)
    assert isinstance(job.error, Unavailable)
    for name in RANKS:
        assert f"group {name}: the ranks failed more than 2 times" in str(host.groups.given_up)
    for ask in (lambda: host.submit(b"a", Verb.FORWARD, M), lambda: host.load(b"a", M)):
        with pytest.raises(Unavailable, match="max_restarts"):
            ask()


# --- any order of events ----------------------------------------------------------------------------------------------


class Events(RuleBasedStateMachine):
    """Clients, ranks and the clock do what they like."""

    SESSIONS = st.sampled_from([b"a", b"b", b"c"])
    GROUP = st.sampled_from(sorted(RANKS))

    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.host = Host()
        self.host.all_ready()
        self.began: dict[str, str] = {}
        """The group in which each job was first seen at work."""

    def executor(self, name: str) -> Executor:
        return next(each for each in self.host.groups if each.name == name)

    @rule(session=SESSIONS, model=st.sampled_from(sorted(MODELS)), degree=st.sampled_from([None, 1, 2]))
    def load(self, session: bytes, model: str, degree: int | None) -> None:
        with suppress(QueueFull, Unavailable, ArgumentError):
            self.host.load(session, MODELS[model], {"sequence_parallel_degree": degree} if degree else "auto")

    @rule(
        session=SESSIONS,
        model=st.sampled_from(sorted(MODELS)),
        verb=st.sampled_from([*ON_MODEL, Verb.UNLOAD]),
        steps=st.integers(1, 3),
    )
    def submit(self, session: bytes, model: str, verb: Verb, steps: int) -> None:
        full = len(self.host.groups.jobs) >= LIMIT
        refused = Unavailable, ModelNotFound, *([QueueFull] if full else [])
        with suppress(*refused):
            self.host.submit(session, verb, MODELS[model], steps if verb is Verb.SAMPLE else 1)
            assert not full

    @precondition(lambda self: self.host.groups.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.host.groups.cancel(data.draw(st.sampled_from([job.id for job in self.host.groups.jobs])))
        self.host.groups.poll()

    @rule(session=SESSIONS)
    def drop(self, session: bytes) -> None:
        self.host.groups.drop(session)
        self.host.groups.poll()
        assert all(job.session != session or job.cancelling for job in self.host.groups.jobs)

    @rule()
    def ready(self) -> None:
        self.host.all_ready()

    @rule(name=GROUP, times=st.integers(1, 3))
    def answer(self, name: str, times: int) -> None:
        for _ in range(times):
            self.host.answer(self.executor(name))

    @rule(name=GROUP)
    def lose(self, name: str) -> None:
        if self.host.ranks(self.executor(name)):
            self.host.lose(self.executor(name))

    @invariant()
    def each_job_is_in_one_group_and_has_not_ended(self) -> None:
        groups = self.host.groups
        ids = [job.id for job in groups.jobs]
        assert len(set(ids)) == len(ids)
        assert not {job.id for job, _ in self.host.ended} & set(ids)
        assert {job.id for job in self.host.submitted} == {job.id for job, _ in self.host.ended} | set(ids)
        assert not any(each.scheduler.jobs for each in groups if each.given_up is not None)

    @invariant()
    def one_work_item_is_with_each_group(self) -> None:
        for executor in self.host.groups:
            waiting = {work.id for rank in self.host.ranks(executor) for work in rank.unanswered}
            assert len(waiting) <= 1
            assert not waiting or executor.group.state is GroupState.BUSY

    @invariant()
    def nobody_waits_for_what_is_free(self) -> None:
        groups = self.host.groups
        assert not [each.name for each in groups if each.is_free and groups.routes.waiting_for(each)]

    @invariant()
    def a_run_that_began_stays(self) -> None:
        for executor in self.host.groups:
            for job in executor.scheduler.jobs:
                if job.started_s is not None and job.verb is Verb.SAMPLE:
                    before = self.began.setdefault(job.id, executor.name)
                    if before != executor.name:
                        assert self.executor(before).given_up is not None
                        self.began[job.id] = executor.name

    def teardown(self) -> None:
        try:
            host = self.host
            for _ in range(60):
                if not host.groups.jobs:
                    break
                host.clock.now += 100 * any(not host.ranks(each) for each in host.groups)
                host.groups.poll()
                host.all_ready()
                for executor in host.groups:
                    host.answer(executor)
            assert not host.groups.jobs, "jobs that never end"
            for session in (b"a", b"b", b"c"):
                host.groups.drop(session)
            assert not host.groups.host.store._pins
            assert host.groups.routes._homes == {}
        finally:
            logging.disable(logging.NOTSET)
            self.host.stack.close()
        assert all(rank.reaped for rank in FakeRank.all)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
