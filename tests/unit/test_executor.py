"""Ranks and queue together, in any order of events: what becomes of jobs, and of the ranks.

The ranks are fakes. Everything between a submitted job and its end is the real thing.
"""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tacod.config import Config, Models
from tacod.execution.executor import Executor
from tacod.execution.host import Host
from tacod.execution.manifest import Model
from tacod.execution.scheduler import ON_MODEL, Job, Outcome, Verb
from tacod.group.board import Blocks
from tacod.group.group import AGREE_S, EXIT_S, GroupState
from tacod.group.pace import LEAST_PATIENCE_S
from tacod.group.work import Stepped
from tacod_client.errors import (
    Cancelled,
    EngineError,
    JobNotFound,
    ModelCorrupt,
    ModelNotFound,
    ModelUnsupported,
    OutOfMemory,
    QueueFull,
    RankFailed,
    TacodError,
    Unavailable,
)
from tacod_client.wire import Message, Tensor

from .fake_ranks import FACTS, FakeRank, body_of, descriptors, fakes, step

RANKS = 3
LIMIT = 4
RETRIES = 1
RESTARTS = 6
SESSIONS = st.sampled_from([b"a", b"b"])
RANK = st.integers(0, RANKS - 1)
ANSWERS: dict[str, dict[str, Any]] = {
    "load": {"model": FACTS, "base": FACTS, "compute_s": 0.0, "collective_s": 0.0},
    "unload": {"compute_s": 0.0, "collective_s": 0.0},
    "evict": {"compute_s": 0.0, "collective_s": 0.0},
    "forward": step(RANKS),
    "call": {**step(1), "forwards": 0},
    "sample": step(RANKS, sigma=0.5),
}
CONFIG = Config.model_validate(
    {
        "group": {
            "device": "cpu",
            "ranks": RANKS,
            "retries": RETRIES,
            "max_restarts": RESTARTS,
            "step_timeout_s": 10.0,
            "load_timeout_s": 20.0,
            "start_timeout_s": 30.0,
        },
        "limits": {"queue": LIMIT},
    }
)


def raised(place: str = "a.py:1", exchanges: int = 1) -> dict[str, Any]:
    """What a rank tells of an error that it didn't expect."""
    return {"traceback": "Traceback", "what": "TypeError: 3", "place": place, "exchanges": exchanges}


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_in_circles() -> None:
    """What earlier tests left there closes its descriptors now, and not between two counts."""
    gc.collect()


class Events(RuleBasedStateMachine):
    """Clients, ranks and the clock do what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.clock = self.stack.enter_context(fakes())
        logging.disable(logging.CRITICAL)
        self.stack.callback(logging.disable, logging.NOTSET)
        self.descriptors = descriptors()
        self.folder = Path(tempfile.mkdtemp(prefix="tacod-"))
        self.stack.callback(shutil.rmtree, self.folder)
        self.submitted: list[Job] = []
        self.ended: list[Job] = []
        self.completed: dict[str, bool] = {}
        """Of each job that rank 0 has completed before it reported: whether it was being cancelled then."""
        self.said: dict[int, set[str]] = {}
        """How ranks have answered each work item."""

    @initialize(loaded=st.booleans())
    def begin(self, loaded: bool) -> None:
        model = Model("m", "/models/m", "i", None)
        devices = [f"cpu:{index}" for index in range(RANKS)]
        preload = [model] if loaded else []
        host = Host(CONFIG)
        self.stack.callback(host.memories.close)
        self.executor = Executor(CONFIG, "0", devices, preload, self.folder, host, self.on_progress, self.on_end)
        self.executor.poll()

    def on_progress(self, job: Job, body: dict[str, Any]) -> None:
        assert all(job is not each for each in self.ended), "progress after the end"

    def on_end(self, executor: Executor, job: Job, step: Stepped | None) -> None:
        assert all(job is not each for each in self.ended), "a job ended twice"
        assert (job.error is None) == (job.outcome is Outcome.RESULT)
        if job.outcome is Outcome.RESULT and job.verb is Verb.LOAD:
            assert job.model in self.executor.manifest
        if job.outcome is Outcome.RESULT and job.verb in ON_MODEL:
            assert step is not None
        if job.id in self.completed:
            expected = Outcome.CANCELLED if self.completed[job.id] else Outcome.RESULT
            assert job.outcome is expected, "what is completed was undone"
        elif job.outcome is Outcome.RESULT and self.alive[0].heard[-1].type == job.verb.value:
            assert self.said[self.executor.group._commands] == {"done"}, "the ranks don't agree on a result"
        self.ended.append(job)

    @property
    def alive(self) -> list[FakeRank]:
        return [rank for rank in FakeRank.all if not rank.reaped]

    # --- clients --------------------------------------------------------------------------------------------------

    @rule(session=SESSIONS, verb=st.sampled_from(Verb), steps=st.integers(1, 3))
    def submit(self, session: bytes, verb: Verb, steps: int) -> None:
        body = body_of(verb, Model("m", "/models/m", "i", None))
        job = Job(str(len(self.submitted)), session, 0, verb, "m", body, steps if verb is Verb.SAMPLE else 1)
        refused = Unavailable if self.executor.given_up else QueueFull
        if self.executor.given_up or len(self.unfinished) == LIMIT:
            with pytest.raises(refused):
                self.executor.submit(job)
        else:
            self.executor.submit(job)
            self.submitted.append(job)
        self.executor.poll()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.submitted))
        if job.outcome is not None or job.id in self.completed:
            with pytest.raises(JobNotFound):
                self.executor.cancel(job.id)
        else:
            assert self.executor.cancel(job.id) is (job.outcome is not None)

    @rule(session=SESSIONS)
    def drop(self, session: bytes) -> None:
        self.executor.drop(session)

    # --- ranks ----------------------------------------------------------------------------------------------------

    @rule(index=RANK)
    def report_ready(self, index: int) -> None:
        for rank in self.alive:
            if rank.index == index:
                rank.greet()
        self.executor.poll()

    @rule()
    def all_report_ready(self) -> None:
        for index in range(RANKS):
            self.report_ready(index)

    def answer(self, index: int, kind: str, body: dict[str, Any] | None = None) -> None:
        for rank in self.alive:
            if rank.index == index and rank.unanswered:
                (work,) = rank.unanswered
                self.said.setdefault(work.id, set()).add(kind)
                rank.answer(kind, ANSWERS[work.type] if body is None else body)

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.executor.scheduler.jobs if job.id not in self.completed]

    @rule()
    def complete(self) -> None:
        """Rank 0 tells a client of its result, and has yet to report."""
        job = self.executor.scheduler.running
        for rank in self.alive[:1]:
            if rank.complete() and job is not None:
                self.completed.setdefault(job.id, job.cancelling)

    @rule(index=RANK)
    def finish(self, index: int) -> None:
        self.answer(index, "done")
        self.executor.poll()

    @rule()
    def all_finish(self) -> None:
        for index in range(RANKS):
            self.answer(index, "done")
        self.executor.poll()

    @rule(index=RANK, error=st.sampled_from([OutOfMemory("no memory"), ModelUnsupported("a UNet")]))
    def fail(self, index: int, error: Any) -> None:
        self.answer(index, "failed", {"error": error.to_wire()})
        self.executor.poll()

    @rule(error=st.sampled_from([OutOfMemory("no memory"), ModelUnsupported("a UNet")]))
    def all_fail(self, error: Any) -> None:
        pids = [rank.pid for rank in self.alive]
        busy = self.executor.group.state is GroupState.BUSY and all(rank.unanswered for rank in self.alive)
        for index in range(RANKS):
            self.answer(index, "failed", {"error": error.to_wire()})
        self.executor.poll()
        if busy and all(rank.code is None for rank in self.alive):
            assert [rank.pid for rank in self.alive] == pids, "ranks that agree stay"

    @rule(index=RANK)
    def break_down(self, index: int) -> None:
        self.answer(index, "broken", {"traceback": "Traceback"})
        self.executor.poll()

    @rule(index=RANK, place=st.sampled_from(["a.py:1", "b.py:2"]))
    def raise_alone(self, index: int, place: str) -> None:
        self.answer(index, "raised", raised(place))
        self.executor.poll()

    @rule()
    def all_raise(self) -> None:
        pids = [rank.pid for rank in self.alive]
        busy = self.executor.group.state is GroupState.BUSY and all(rank.unanswered for rank in self.alive)
        for index in range(RANKS):
            self.answer(index, "raised", raised())
        self.executor.poll()
        if busy and all(rank.code is None for rank in self.alive):
            assert [rank.pid for rank in self.alive] == pids, "ranks that raise alike stay"

    @rule(index=RANK, code=st.sampled_from([-9, -11, 3]))
    def die(self, index: int, code: int) -> None:
        for rank in self.alive:
            if rank.index == index:
                rank.die(code)
        self.executor.poll()
        self.none_outlives_it()

    def none_outlives_it(self) -> None:
        """A dead rank takes all others with it; if it had said that it is broken, after a moment for their exits."""
        current = self.executor.group._current
        if current is not None and current.broken is not None:
            self.clock.now += EXIT_S + 0.1
            self.executor.poll()
        assert all(rank.code is None for rank in self.alive)

    @rule(
        index=RANK,
        kind=st.sampled_from(["ready", "done", "failed", "raised", "broken", "progress", "begun", "no such thing"]),
    )
    def die_talking(self, index: int, kind: str) -> None:
        """A rank's last words, whatever they are, don't outlive it."""
        body = {"memory_used_bytes": 7, "done": 1, "total": 2, "traceback": "", **step(RANKS, sigma=0.5)}
        body |= {"error": OutOfMemory("no memory").to_wire(), "model": FACTS, "base": FACTS, **raised()}
        ended = len(self.ended)
        for rank in self.alive:
            if rank.index == index:
                rank.say(kind, body, self.executor.group._commands)
                rank.die(-9)
        self.executor.poll()
        self.none_outlives_it()
        assert all(job.error is not None or job.id in self.completed for job in self.ended[ended:])

    @rule(index=RANK, done=st.integers(0, 3))
    def go_on(self, index: int, done: int) -> None:
        """A rank says that it is still at work."""
        for rank in self.alive:
            if rank.index == index:
                for work in rank.unanswered:
                    rank.say("begun", {}, work.id)
                    rank.say("progress", {"done": done, "total": 3}, work.id)
        self.executor.poll()

    # --- the clock ------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.executor.poll()

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def every_job_is_somewhere_once(self) -> None:
        if hasattr(self, "executor"):
            here = self.executor.scheduler.jobs
            assert sorted(job.id for job in here + self.ended) == sorted(job.id for job in self.submitted)
            assert len(self.unfinished) <= LIMIT
            assert all(job.attempts <= RETRIES + 1 for job in self.submitted)
            assert sum(self.executor.records.metrics.jobs_total.values()) == len(self.ended)

    @invariant()
    def one_work_item_is_with_the_ranks(self) -> None:
        if hasattr(self, "executor"):
            executor = self.executor
            busy = executor.group.state is GroupState.BUSY
            assert busy == (executor.current is not None)
            assert executor.scheduler.running is (executor.current.job if executor.current is not None else None)
            latest = {rank.heard[-1].id for rank in self.alive if rank.heard}
            assert len(latest) <= 1, "all ranks have the same work"
            for rank in self.alive:
                assert len(rank.unanswered) <= (1 if busy else 0), "a rank gets work only when all have answered"

    @invariant()
    def all_ranks_are_of_one_generation(self) -> None:
        assert len({rank.generation for rank in self.alive}) <= 1
        assert len(self.alive) in (0, RANKS)
        # Each living rank has a pidfd and a channel with two ends, and all of them have one memory.
        files, memories = self.descriptors
        expected = files + 3 * len(self.alive), memories + bool(self.alive)
        assert descriptors() == expected

    @invariant()
    def failures_say_why(self) -> None:
        for job in self.ended:
            if isinstance(job.error, RankFailed):
                assert 2 <= job.attempts <= RETRIES + 1

    def teardown(self) -> None:
        """However it went, ranks that behave bring what is left to its end."""
        try:
            for _ in range(200):
                if not self.executor.scheduler.jobs:
                    break
                self.clock.now += 40 if not self.alive else 0.1
                self.executor.poll()
                for rank in self.alive:
                    if not rank.unanswered and rank.greeted and self.executor.group.state is GroupState.BUSY:
                        # It has answered already, in a way that holds the others up: their deadline ends that.
                        self.clock.now += 31
                self.all_report_ready()
                self.all_finish()
            assert self.executor.scheduler.jobs == []
            self.executor.close()
            assert self.alive == []
            assert descriptors() == self.descriptors
            assert [path.name for path in self.folder.iterdir()] == []
        finally:
            self.stack.close()


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# --- one after the other ----------------------------------------------------------------------------------------------


class Walk:
    """An executor whose ranks do as a test says, step by step."""

    def __init__(
        self, stack: ExitStack, folder: Path, preload: tuple[Model, ...] = (), config: Config = CONFIG
    ) -> None:
        self.clock = stack.enter_context(fakes())
        self.ended: list[Job] = []
        devices = [f"cpu:{index}" for index in range(RANKS)]
        self.host = Host(config)
        stack.callback(self.host.memories.close)
        self.executor = Executor(
            config,
            "0",
            devices,
            list(preload),
            folder,
            self.host,
            lambda *told: None,
            lambda executor, job, step: self.ended.append(job),
        )
        stack.callback(self.executor.close)
        self.executor.poll()

    @property
    def alive(self) -> list[FakeRank]:
        return [rank for rank in FakeRank.all if not rank.reaped]

    def ready(self) -> None:
        for rank in self.alive:
            rank.greet()
        self.executor.poll()

    @property
    def work(self) -> Message:
        """What the ranks were told last."""
        return self.alive[0].heard[-1]

    def answer(self, kind: str = "done", body: dict[str, Any] | None = None, ranks: int = RANKS) -> None:
        told = ANSWERS[self.work.type] if body is None else body
        for rank in self.alive[:ranks]:
            rank.answer(kind, told)
        self.executor.poll()

    def come_back(self) -> None:
        """The ranks are replaced."""
        gone = self.alive
        while not self.alive or self.alive[0] is gone[0]:
            self.clock.now += 1
            self.executor.poll()
        self.ready()

    def submit(self, verb: Verb, model: Model, job: str = "j", session: bytes = b"a") -> None:
        self.executor.submit(Job(job, session, 1, verb, model.id, body_of(verb, model), 1))
        self.executor.poll()


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    with ExitStack() as stack:
        yield Walk(stack, tmp_path)


NO_MEMORY = {"error": OutOfMemory("no memory").to_wire()}
BASE = Model("base", "/base", "i", None)
PATCHED = Model("patched", "/base", "i", None, base=BASE, patches=[{"path": "/lora"}])
OTHER = Model("other", "/other", "i", None)


def ids(walk: Walk) -> list[str]:
    return [model.id for model in walk.executor.manifest]


def test_what_all_ranks_raise_alike_is_an_answer(walk: Walk) -> None:
    walk.ready()
    ranks = walk.alive
    walk.submit(Verb.LOAD, BASE)
    walk.answer("raised", raised())
    (job,) = walk.ended
    assert type(job.error) is EngineError
    assert "load failed on all ranks alike, which go on: TypeError: 3" in job.error.message
    assert walk.alive == ranks
    walk.submit(Verb.LOAD, BASE, "again")
    walk.answer()
    assert ids(walk) == ["base"]
    assert walk.executor.group.restarts == 0


@pytest.mark.parametrize(
    "other", [("raised", raised("b.py:2")), ("raised", raised(exchanges=2)), ("done", None), ("failed", NO_MEMORY)]
)
def test_ranks_that_raise_otherwise_are_replaced(walk: Walk, other: tuple[str, Any]) -> None:
    """At another place, or after another number of exchanges, one of them may wait for another."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    gone = walk.alive
    walk.answer("raised", raised(), ranks=1)
    assert walk.alive == gone, "the others have a while to say the same"
    walk.answer(*other)
    assert all(rank.reaped for rank in gone)
    walk.come_back()
    walk.answer()
    assert ids(walk) == ["base"]


def test_one_that_raises_alone_is_waited_for_no_longer_than_ranks_have_to_agree(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    gone = walk.alive
    walk.answer("raised", raised(), ranks=1)
    walk.clock.now += AGREE_S + 0.1
    walk.executor.poll()
    assert all(rank.reaped for rank in gone)


BROKEN = {"traceback": "RuntimeError: Connection closed by peer", "what": "RuntimeError: Connection closed by peer"}


def lost(walk: Walk, caplog: pytest.LogCaptureFixture) -> str:
    """Why the ranks were lost, as the log tells it once."""
    (line,) = [each.getMessage() for each in caplog.records if "ending all ranks" in each.getMessage()]
    return line


@pytest.mark.parametrize("after_s", [None, 0.0, EXIT_S / 2])
def test_a_rank_that_ends_is_the_cause_and_not_the_exchange_that_broke_off(
    walk: Walk, caplog: pytest.LogCaptureFixture, after_s: float | None
) -> None:
    """Whether its exit is seen before the other rank's report, with it or after it; that rank exits too."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    gone = walk.alive
    if after_s is None:
        gone[1].die(3)
    gone[0].answer("broken", BROKEN)
    if after_s:
        walk.executor.poll()
        gone[0].die(1)
        walk.clock.now += after_s
        walk.executor.poll()
        assert walk.alive == gone, "the cause may be seen in a moment"
    gone[1].die(3)
    walk.executor.poll()
    assert lost(walk, caplog) == f"rank 1 (cpu:1, pid {gone[1].pid}) exited with code 3; ending all ranks"
    assert all(rank.reaped for rank in gone)


def test_a_rank_that_is_broken_itself_is_the_cause_after_a_moment(walk: Walk, caplog: pytest.LogCaptureFixture) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    gone = walk.alive
    gone[1].answer("broken", BROKEN)
    walk.executor.poll()
    gone[1].die(1)
    walk.executor.poll()
    assert walk.alive == gone
    walk.clock.now += EXIT_S + 0.1
    walk.executor.poll()
    assert lost(walk, caplog).startswith("rank 1 (cpu:1) raised:\nRuntimeError: Connection closed by peer")
    assert all(rank.reaped for rank in gone)


@pytest.mark.parametrize("first", range(RANKS))
def test_the_first_of_those_that_are_broken_is_the_cause(
    walk: Walk, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    """All have answered, so none is waited for."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    gone = walk.alive
    for rank in sorted(gone, key=lambda each: each.index != first):
        rank.answer("broken", BROKEN)
        walk.executor.poll()
    assert lost(walk, caplog).startswith(f"rank {first} (cpu:{first}) raised:")
    assert all(rank.reaped for rank in gone)


def test_jobs_that_end_the_ranks_each_time_are_not_held_against_them(walk: Walk) -> None:
    """More of them than there may be restarts; ranks that die for no job's sake still count."""
    walk.ready()
    for number in range(RESTARTS + 2):
        walk.submit(Verb.LOAD, BASE, str(number))
        for _ in range(RETRIES + 1):
            walk.alive[1].die(-11)
            walk.come_back()
        assert isinstance(walk.ended[number].error, RankFailed)
    assert walk.executor.given_up is None
    assert walk.executor.group.restarts == (RESTARTS + 2) * (RETRIES + 1)
    for _ in range(RESTARTS):
        walk.alive[1].die(-9)
        walk.come_back()
    walk.alive[1].die(-9)
    walk.executor.poll()
    assert "group.max_restarts" in str(walk.executor.given_up)


def retried(walk: Walk) -> int:
    return walk.executor.records.metrics.retried_forwards


def test_a_step_counts_as_retried_if_it_is_begun_again(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    walk.submit(Verb.FORWARD, BASE, "fails")
    for _ in range(RETRIES + 1):
        walk.alive[1].die(-11)
        walk.come_back()
        walk.answer()  # the model, for the new ranks
    assert walk.ended[-1].outcome is Outcome.FAILED
    assert retried(walk) == RETRIES
    walk.submit(Verb.FORWARD, BASE, "cancelled")
    walk.executor.cancel("cancelled")
    walk.alive[1].die(-9)
    walk.come_back()
    assert walk.ended[-1].outcome is Outcome.CANCELLED
    assert retried(walk) == RETRIES


def test_a_step_of_ranks_that_are_given_up_is_not_retried(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    for _ in range(RESTARTS):
        walk.alive[1].die(-9)
        walk.come_back()
        walk.answer()  # the model, for the new ranks
    walk.submit(Verb.FORWARD, BASE, "job")
    walk.alive[1].die(-9)
    walk.executor.poll()
    assert walk.executor.given_up is not None
    assert walk.ended[-1].outcome is Outcome.FAILED
    assert retried(walk) == 0


def test_a_model_is_unloaded_with_what_was_made_of_it(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, PATCHED)
    walk.answer()
    assert ids(walk) == ["base", "patched"]
    walk.submit(Verb.UNLOAD, BASE)
    assert walk.work.body["evict_models"] == ["patched"]
    walk.answer()
    assert ids(walk) == []


def test_for_want_of_memory_a_base_goes_after_what_was_made_of_it(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, PATCHED)
    walk.answer()
    walk.submit(Verb.LOAD, OTHER)
    gone = []
    while walk.executor.scheduler.running is not None and len(gone) < 5:
        walk.answer("failed", NO_MEMORY)
        gone.append(walk.work.body["evict_models"] if walk.executor.scheduler.running is not None else None)
    assert gone == [["patched"], ["base"], None]
    assert isinstance(walk.ended[-1].error, OutOfMemory)


SHRINKS = {"error": OutOfMemory("no memory", shrinks=True).to_wire()}


@pytest.mark.parametrize("model", [BASE, PATCHED], ids=["base", "patched"])
def test_a_load_without_memory_is_tried_with_fewer_blocks(walk: Walk, model: Model) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, OTHER)
    walk.answer()
    walk.submit(Verb.LOAD, model, "job")
    tried = []
    for _ in range(5):
        tried.append((walk.work.body["evict_models"], walk.work.body["fewer"]))
        walk.answer("failed", SHRINKS)
    # Other models first; each try costs a load, so each gives up twice as much as the one before.
    assert tried == [([], 0), (["other"], 0), ([], 1), ([], 2), ([], 4)]
    walk.answer()
    assert walk.ended[-1].outcome is Outcome.RESULT
    # What was loaded so is loaded so again, and differently once a client has unloaded it.
    walk.alive[0].die(-9)
    walk.come_back()
    assert walk.work.body["fewer"] == 8
    walk.answer()
    if model is PATCHED:
        walk.answer()
    walk.submit(Verb.UNLOAD, BASE, "unload")
    walk.answer()
    walk.submit(Verb.LOAD, model, "anew")
    assert walk.work.body["fewer"] == 0


@pytest.mark.parametrize("verb", ON_MODEL)
def test_a_step_without_memory_is_done_again_with_fewer_blocks(walk: Walk, verb: Verb) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, PATCHED)
    walk.answer()
    walk.submit(verb, PATCHED, "job")
    walk.answer("failed", SHRINKS)
    assert (walk.work.type, walk.work.body["evict_models"], walk.work.body["fewer"]) == ("load", ["patched", "base"], 1)
    walk.answer()
    assert walk.work.type == verb.value
    walk.answer("failed", NO_MEMORY)
    assert isinstance(walk.ended[-1].error, OutOfMemory)
    # For others it is as it was.
    assert (walk.work.type, walk.work.body["evict_models"], walk.work.body["fewer"]) == ("load", ["patched", "base"], 0)
    walk.answer()
    assert ids(walk) == ["base"]
    walk.submit(verb, PATCHED, "next")
    assert (walk.work.type, walk.work.body["model"], walk.work.body["fewer"]) == ("load", "patched", 0)


def test_a_model_that_grows_again_does_so_once(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    walk.answer()
    walk.submit(Verb.FORWARD, BASE, "job")
    walk.answer("failed", SHRINKS)
    walk.answer()
    walk.answer("failed", NO_MEMORY)
    assert walk.work.body["evict_models"] == ["base"]
    # There is less room than before.
    walk.answer("failed", SHRINKS)
    assert (walk.work.type, walk.work.body["evict_models"], walk.work.body["fewer"]) == ("load", [], 1)
    walk.answer()
    assert ids(walk) == ["base"]
    walk.submit(Verb.FORWARD, BASE, "next")
    assert walk.work.type == "forward"


def test_patches_without_memory_have_their_base_hold_fewer_blocks(walk: Walk) -> None:
    """Which it does only if it is loaded anew."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    walk.answer()
    walk.submit(Verb.LOAD, PATCHED, "patched")
    tried = []
    for _ in range(3):
        tried.append((walk.work.body["evict_models"], walk.work.body["fewer"]))
        walk.answer("failed", SHRINKS)
    assert tried == [([], 0), (["base"], 1), ([], 2)]
    walk.answer()
    assert ids(walk) == ["base", "patched"]
    assert walk.ended[-1].outcome is Outcome.RESULT


def test_patches_without_memory_on_new_ranks_have_their_base_hold_fewer_blocks(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, PATCHED)
    walk.answer()
    walk.alive[0].die(-9)
    walk.come_back()
    walk.answer()
    tried = []
    for _ in range(3):
        tried.append((walk.work.body["model"], walk.work.body["evict_models"], walk.work.body["fewer"]))
        walk.answer("failed", SHRINKS)
    assert tried == [("patched", [], 0), ("patched", ["patched", "base"], 1), ("patched", [], 2)]
    walk.answer()
    assert ids(walk) == ["base", "patched"]
    assert walk.executor.residency.coming == []


@pytest.mark.parametrize("alone", [False, True])
def test_after_a_load_that_even_the_fewest_blocks_leave_no_memory_for_the_next_one_tries_all(
    walk: Walk, alone: bool
) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    walk.answer("failed", SHRINKS)
    assert walk.work.body["fewer"] == 1
    walk.answer("failed", NO_MEMORY, ranks=1 if alone else RANKS)
    if alone:
        walk.clock.now += AGREE_S + 1
        walk.come_back()
    assert isinstance(walk.ended[-1].error, OutOfMemory)
    walk.submit(Verb.LOAD, BASE, "again")
    assert walk.work.body["fewer"] == 0


def test_new_ranks_hold_all_that_fits_after_a_step_that_the_fewest_blocks_leave_no_memory_for(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    walk.answer()
    walk.submit(Verb.FORWARD, BASE, "job")
    walk.answer("failed", SHRINKS)
    walk.answer()
    walk.answer("failed", NO_MEMORY, ranks=1)
    walk.clock.now += AGREE_S + 1
    walk.come_back()
    assert isinstance(walk.ended[-1].error, OutOfMemory)
    assert (walk.work.body["model"], walk.work.body["evict_models"], walk.work.body["fewer"]) == ("base", [], 0)
    walk.answer()
    assert walk.executor.residency.coming == []


@pytest.mark.parametrize("verb", ON_MODEL)
def test_a_model_that_is_to_hold_fewer_blocks_may_have_lost_its_patches(walk: Walk, verb: Verb) -> None:
    """They made room in the store; its client sends them again."""
    patched = variant(1)
    walk.ready()
    walk.executor.store.put(content(1))
    walk.submit(Verb.LOAD, patched)
    walk.answer()
    walk.executor.store.limit = 10
    walk.executor.store.put(content(2))
    assert walk.executor.store.lacks(patched.digests)
    walk.submit(verb, patched, "job")
    walk.answer("failed", SHRINKS)
    assert (walk.work.body["model"], walk.work.body["evict_models"], walk.work.body["fewer"]) == (
        "base",
        ["v1", "base"],
        1,
    )
    walk.answer()
    assert isinstance(walk.ended[-1].error, ModelNotFound)
    assert "load it again" in walk.ended[-1].error.message
    assert ids(walk) == ["base"]


def test_a_step_that_is_cancelled_is_not_done_again(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    walk.answer()
    walk.submit(Verb.FORWARD, BASE, "job")
    walk.executor.cancel("job")
    walk.answer("failed", SHRINKS)
    assert walk.ended[-1].outcome is Outcome.CANCELLED


@pytest.mark.parametrize("verb", [Verb.LOAD, *ON_MODEL])
def test_one_rank_without_memory_has_new_ranks_hold_fewer_blocks(walk: Walk, verb: Verb) -> None:
    """More often than ranks may be lost, and a job be tried."""
    walk.ready()
    if verb is not Verb.LOAD:
        walk.submit(Verb.LOAD, BASE, "load")
        walk.answer()
    walk.submit(verb, BASE, "job")
    for number in range(RESTARTS + RETRIES + 2):
        walk.answer("failed", SHRINKS, ranks=1)
        walk.clock.now += AGREE_S + 1
        walk.come_back()
        assert walk.work.body["fewer"] == 2**number
        if verb is not Verb.LOAD:
            walk.answer()
    walk.answer()
    assert walk.ended[-1].outcome is Outcome.RESULT
    assert walk.executor.given_up is None


def test_what_was_to_make_room_stays_if_the_load_that_wanted_it_is_gone(walk: Walk) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    walk.answer()
    walk.submit(Verb.LOAD, OTHER, "wants room")
    walk.answer("failed", NO_MEMORY)
    assert walk.work.body["evict_models"] == ["base"]
    walk.executor.cancel("wants room")
    walk.alive[0].die(-9)
    walk.come_back()
    walk.answer()  # the base is there again
    walk.submit(Verb.LOAD, Model("small", "/small", "i", None), "small")
    assert walk.work.body["evict_models"] == []
    walk.answer()
    assert ids(walk) == ["base", "small"]


def test_a_rank_that_hangs_up_and_lives_on_is_out_of_time_at_last(walk: Walk) -> None:
    """What is left of its channel is looked at once, and not for ever."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE)
    before = set(walk.executor.group.sources)
    walk.alive[1].hang_up()
    walk.executor.poll()  # what it left unread is an error first
    walk.executor.poll()
    assert len(before - set(walk.executor.group.sources)) == 1
    assert walk.executor.group.state is GroupState.BUSY
    gone = walk.alive
    walk.clock.now += CONFIG.groups[0].load_timeout_s + 1
    walk.executor.poll()
    assert all(rank.reaped for rank in gone)


def busy_with(walk: Walk, verb: Verb) -> list[FakeRank]:
    """The ranks, at work on a load or, once the model is there, something else."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    if verb is not Verb.LOAD:
        walk.answer()
        walk.submit(verb, BASE, "work")
    return walk.alive


@pytest.mark.parametrize("made_way", [False, True])
def test_new_ranks_get_the_steps_that_are_kept_once(walk: Walk, made_way: bool) -> None:
    """With their bytes, so they don't keep them; a run whose steps have made way begins anew."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    walk.executor.submit(Job("work", b"a", 1, Verb.SAMPLE, BASE.id, body_of(Verb.SAMPLE, BASE), 3))
    walk.executor.poll()
    store = walk.executor.store
    store.limit = 64
    record = Tensor("U8", (8,), (bytes(8),))
    walk.answer("done", {**ANSWERS["sample"], "record": [record]})
    assert walk.work.body["step"] == 1
    walk.alive[0].die(-9)
    walk.executor.poll()
    if made_way:
        store.put(Tensor("U8", (store.limit,), (bytes(store.limit),)), b"client")
    walk.come_back()
    while walk.work.type != "sample":
        walk.answer()
    told = walk.work.body
    assert told["step"] == (0 if made_way else 1)
    assert [bytes(each.frames[0]) for each in told["record"]] == ([] if made_way else [bytes(8)])


def pass_by(walk: Walk, seconds: float) -> None:
    walk.clock.now += seconds
    walk.executor.poll()


@pytest.mark.parametrize("verb", [Verb.FORWARD, Verb.SAMPLE])
def test_each_forward_of_a_step_has_its_own_time(walk: Walk, verb: Verb) -> None:
    """A graph's capture is one more, and so are a second evaluation and a guidance's other condition."""
    ranks = busy_with(walk, verb)
    for _ in range(3):
        for rank in ranks:
            rank.say("begun", {}, walk.work.id)
        pass_by(walk, CONFIG.groups[0].step_timeout_s - 1)
    # Launched early, as on a GPU: their times follow one another.
    for rank in ranks:
        for _ in range(2):
            rank.say("begun", {}, walk.work.id)
    pass_by(walk, 3 * CONFIG.groups[0].step_timeout_s)
    assert walk.executor.group.state is GroupState.BUSY
    walk.answer()
    assert walk.ended[-1].outcome is Outcome.RESULT
    assert walk.ended[-1].attempts == 1


def test_a_rank_that_hangs_in_a_later_forward_is_found(walk: Walk) -> None:
    ranks = busy_with(walk, Verb.SAMPLE)
    for rank in ranks:
        rank.say("begun", {}, walk.work.id)
    pass_by(walk, 2 * CONFIG.groups[0].step_timeout_s - 1)
    assert walk.executor.group.state is GroupState.BUSY
    pass_by(walk, 2)
    assert all(rank.reaped for rank in ranks)


def test_a_rank_that_hangs_is_found_although_the_others_go_on(walk: Walk) -> None:
    """The others' answers extend nothing either."""
    ranks = busy_with(walk, Verb.SAMPLE)
    for rank in ranks[1:]:
        for _ in range(9):
            rank.say("begun", {}, walk.work.id)
    walk.executor.poll()
    ranks[2].answer("done", ANSWERS["sample"])
    pass_by(walk, CONFIG.groups[0].step_timeout_s + 1)
    assert all(rank.reaped for rank in ranks)


def tell(walk: Walk, rank: FakeRank, done: int, total: int = 40) -> None:
    """Have a rank's blocks be known to the supervisor."""
    rank._arena.board.tell(rank.index, walk.work.id, Blocks(0, done, total))


def test_the_time_limit_of_a_long_forward_follows_its_blocks(walk: Walk) -> None:
    """The slowest rank's count; a block may take 20 times as long as the longest before it."""
    ranks = busy_with(walk, Verb.FORWARD)
    assert walk.work.body["watched"]
    for done in range(6):
        for rank in ranks[:2]:
            tell(walk, rank, done)
        pass_by(walk, CONFIG.groups[0].step_timeout_s - 1)
    assert walk.executor.group.blocks == Blocks(0, 5, 40)
    pass_by(walk, 19 * (CONFIG.groups[0].step_timeout_s - 1))
    assert walk.executor.group.state is GroupState.BUSY
    tell(walk, ranks[0], 30)
    pass_by(walk, 1)
    assert walk.executor.group.blocks == Blocks(0, 5, 40)
    pass_by(walk, CONFIG.groups[0].step_timeout_s)
    assert all(rank.reaped for rank in ranks)


def test_a_long_forward_that_hangs_is_found_sooner(walk: Walk) -> None:
    """By a pace of one second: not after what the first block had."""
    executor = walk.executor
    executor.group.settings = executor.group.settings.model_copy(update={"step_timeout_s": 1000.0})
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    executor.settings = executor.group.settings
    walk.submit(Verb.FORWARD, BASE, "work")
    ranks = walk.alive
    for done in range(4):
        for rank in ranks:
            tell(walk, rank, done)
        pass_by(walk, 1)
    pass_by(walk, LEAST_PATIENCE_S - 2)
    assert executor.group.state is GroupState.BUSY
    pass_by(walk, 3)
    assert all(rank.reaped for rank in ranks)


def test_what_is_known_to_be_short_is_not_watched(walk: Walk) -> None:
    """The first of a kind is, for nobody knows; then its pace is known."""
    busy_with(walk, Verb.FORWARD)
    walk.answer()
    walk.submit(Verb.FORWARD, BASE, "again")
    walk.clock.now += 0.6
    walk.answer()
    walk.submit(Verb.FORWARD, BASE, "of a long one")
    walk.answer()
    watched = [each.body["watched"] for each in walk.alive[0].heard if each.type == "forward"]
    assert watched == [True, False, True]


def test_cancel_asks_for_a_stop_of_a_watched_forward(walk: Walk) -> None:
    ranks = busy_with(walk, Verb.FORWARD)
    board = ranks[0]._arena.board
    assert not board.is_asked_to_stop(walk.work.id)
    assert walk.executor.cancel("work") is False
    assert board.is_asked_to_stop(walk.work.id)
    error = Cancelled("the forward was stopped before block 3 of 40").to_wire()
    walk.answer("failed", {"error": error})
    assert walk.ended[-1].outcome is Outcome.CANCELLED
    walk.submit(Verb.FORWARD, BASE, "next")
    assert not board.is_asked_to_stop(walk.work.id)
    walk.answer()
    assert walk.ended[-1].outcome is Outcome.RESULT


def test_a_cancelled_forward_that_hangs_ends_in_time(walk: Walk) -> None:
    """Its blocks took long, so without the cancel the next one would have 20 times as long."""
    ranks, block_s = busy_with(walk, Verb.FORWARD), CONFIG.groups[0].step_timeout_s - 1
    for done in range(3):
        for rank in ranks:
            tell(walk, rank, done)
        pass_by(walk, block_s)
    walk.executor.cancel("work")
    for rank in ranks:
        tell(walk, rank, 3)
    pass_by(walk, 3 * block_s - 1)
    assert walk.executor.group.state is GroupState.BUSY
    pass_by(walk, 2)
    assert all(rank.reaped for rank in ranks)
    assert walk.ended[-1].outcome is Outcome.CANCELLED


def test_a_load_that_gets_on_has_all_the_time(walk: Walk) -> None:
    """A slow disk is no fault; only one that stands still is."""
    ranks = busy_with(walk, Verb.LOAD)
    for done in range(1, 6):
        for rank in ranks:
            rank.say("progress", {"done": done, "total": 6}, walk.work.id)
        walk.executor.poll()
        pass_by(walk, CONFIG.groups[0].load_timeout_s - 1)
        assert walk.executor.group.state is GroupState.BUSY
    for rank in ranks[:-1]:
        rank.say("progress", {"done": 6, "total": 6}, walk.work.id)
    pass_by(walk, 2)
    assert all(rank.reaped for rank in ranks), "the last one got no further"


def test_what_others_tell_does_not_give_more_time_to_agree_on_a_failure(walk: Walk) -> None:
    ranks = busy_with(walk, Verb.SAMPLE)
    ranks[0].answer("failed", NO_MEMORY)
    for rank in ranks[1:]:
        for _ in range(3):
            rank.say("begun", {}, walk.work.id)
    walk.executor.poll()
    pass_by(walk, 6)
    assert all(rank.reaped for rank in ranks)


@pytest.mark.parametrize(("kind", "work"), [("done", 7), ("progress", 0), ("ready", 0), ("no such thing", 1)])
def test_ranks_that_say_what_they_were_not_asked_are_replaced(walk: Walk, kind: str, work: int) -> None:
    walk.ready()
    if work:
        walk.submit(Verb.LOAD, BASE)
        assert walk.work.id == 1
    gone = walk.alive
    walk.alive[0].say(kind, {"memory_used_bytes": 1, "done": 1, "total": 2}, work)
    walk.executor.poll()
    assert all(rank.reaped for rank in gone)


def test_a_model_that_does_not_fit_is_not_restored_for_ever(tmp_path: Path) -> None:
    """Rank 0 alone lacks the memory, and the others wait for it: that looks like ranks that hang."""
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path, preload=(BASE, OTHER))
        walk.ready()
        assert walk.work.body["model"] == "base"
        walk.answer("failed", NO_MEMORY, ranks=1)
        walk.clock.now += 6
        walk.come_back()
        assert walk.work.body["model"] == "other"
        walk.answer()
        assert (walk.executor.state, ids(walk)) == ("ready", ["other"])


@pytest.mark.parametrize("kind", ["raised", "killed"])
def test_a_model_whose_restore_ends_the_ranks_is_given_up(tmp_path: Path, kind: str) -> None:
    """As a job is: the second time by the same cause, else after the retries. The daemon goes on without it."""
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path, preload=(BASE, OTHER))
        walk.ready()
        tries = 0
        while walk.work.body["model"] == "base":
            tries += 1
            if kind == "raised":
                walk.answer("raised", raised(), ranks=1)
                walk.clock.now += AGREE_S + 1
            else:
                walk.alive[1].die(-9)
            walk.come_back()
        assert tries == RETRIES + 1
        walk.answer()
        assert (walk.executor.state, ids(walk)) == ("ready", ["other"])
        for _ in range(RESTARTS):
            walk.alive[1].die(-9)
            walk.come_back()
            walk.answer()
        assert walk.executor.given_up is None, "those losses were its own fault"


def test_a_restore_that_works_starts_the_count_anew(tmp_path: Path) -> None:
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path, preload=(BASE,))
        walk.ready()
        for _ in range(RETRIES + 1):
            walk.alive[1].die(-9)
            walk.come_back()
            walk.answer()
            walk.alive[1].die(-9)
            walk.come_back()
        walk.answer()
        assert ids(walk) == ["base"]


@pytest.mark.parametrize("verb", [Verb.LOAD, *ON_MODEL])
def test_want_of_memory_on_one_rank_is_not_held_against_the_ranks(walk: Walk, verb: Verb) -> None:
    """GPUs seldom have the same memory free; the other ranks wait for the one that has none."""
    walk.ready()
    if verb is not Verb.LOAD:
        walk.submit(Verb.LOAD, BASE, "load")
        walk.answer()
    for number in range(RESTARTS + 2):
        walk.submit(verb, BASE, str(number))
        walk.answer("failed", NO_MEMORY, ranks=1)
        walk.clock.now += AGREE_S + 1
        walk.come_back()
        assert isinstance(walk.ended[-1].error, OutOfMemory)
        if verb is not Verb.LOAD:
            walk.answer()
    assert walk.executor.given_up is None
    assert walk.executor.state == "ready"


def test_a_reload_does_not_load_again_what_is_being_loaded(tmp_path: Path) -> None:
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path, preload=(BASE,))
        walk.ready()
        walk.executor.apply_config(CONFIG, [BASE, OTHER])
        walk.answer()
        assert walk.work.body["model"] == "other"
        walk.answer()
        assert walk.executor.group.state is GroupState.IDLE
        assert (walk.executor.state, ids(walk)) == ("ready", ["base", "other"])


def test_ranks_do_not_idle_when_a_model_was_gone_at_its_turn(walk: Walk) -> None:
    walk.ready()
    for model in (BASE, OTHER):
        walk.submit(Verb.LOAD, model, model.id)
        walk.answer()
    walk.submit(Verb.UNLOAD, BASE, "unload")
    walk.submit(Verb.FORWARD, BASE, "too late", b"b")
    walk.submit(Verb.FORWARD, OTHER, "next", b"c")
    walk.answer()
    assert [job.id for job in walk.ended if job.error is not None] == ["too late"]
    assert (walk.work.type, walk.work.body["model"]) == ("forward", "other")


def test_a_model_that_came_meanwhile_is_not_loaded_again(walk: Walk) -> None:
    """And makes no room for itself."""
    walk.ready()
    for job in "abc":
        walk.submit(Verb.LOAD, BASE, job)
    walk.answer()
    assert [(job.id, job.outcome) for job in walk.ended] == [(job, Outcome.RESULT) for job in "abc"]
    assert walk.executor.group.state is GroupState.IDLE
    assert ids(walk) == ["base"]


def run_on(walk: Walk, model: Model, session: bytes, steps: int = 3) -> Job:
    run = Job(f"run of {session.decode()}", session, 1, Verb.SAMPLE, model.id, body_of(Verb.SAMPLE, model), steps)
    walk.executor.submit(run)
    walk.executor.poll()
    return run


def ends(walk: Walk) -> list[str]:
    """Have the ranks answer until they have nothing to do; returns how jobs have ended, in order."""
    before = len(walk.ended)
    for _ in range(50):
        if walk.alive[0].unanswered:
            walk.answer()
        walk.executor.poll()
    assert walk.executor.scheduler.jobs == []
    return [f"{job.id}: {job.outcome.value}" for job in walk.ended[before:] if job.outcome is not None]


@pytest.mark.parametrize("unloaded", [BASE, PATCHED])
def test_an_unload_waits_for_others_runs_that_have_begun(walk: Walk, unloaded: Model) -> None:
    """And their forwards go on beside. It would make the run begin anew, or end it."""
    walk.ready()
    walk.submit(Verb.LOAD, PATCHED, "load")
    walk.answer()
    run = run_on(walk, PATCHED, b"b")
    walk.submit(Verb.UNLOAD, unloaded, "unload")
    walk.submit(Verb.FORWARD, PATCHED, "forward", b"c")
    assert ends(walk) == ["forward: result", "run of b: result", "unload: result"]
    assert run.step == 3


def test_an_unload_waits_for_no_run_that_has_not_begun(walk: Walk) -> None:
    """Nor for its own client's, nor for one of another model."""
    walk.ready()
    for model in (BASE, OTHER):
        walk.submit(Verb.LOAD, model, f"load {model.id}")
        walk.answer()
    walk.submit(Verb.FORWARD, OTHER, "forward")
    walk.submit(Verb.UNLOAD, BASE, "unload")
    run_on(walk, OTHER, b"b")
    run_on(walk, BASE, b"c")
    assert ends(walk) == ["forward: result", "unload: result", "run of c: failed", "run of b: result"]


def test_runs_that_have_not_begun_wait_for_an_unload_that_waits(walk: Walk) -> None:
    """Else clients whose runs overlap would keep it waiting for ever."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    run_on(walk, BASE, b"b")
    walk.submit(Verb.UNLOAD, BASE, "unload")
    run_on(walk, BASE, b"c")
    assert ends(walk) == ["run of b: result", "unload: result", "run of c: failed"]


@pytest.mark.parametrize("way", ["cancelled", "dropped", "ranks lost"])
def test_an_unload_waits_for_no_run_that_has_ended(walk: Walk, way: str) -> None:
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    run = run_on(walk, BASE, b"b")
    walk.submit(Verb.UNLOAD, BASE, "unload")
    if way == "cancelled":
        walk.executor.cancel(run.id)
    elif way == "dropped":
        walk.executor.drop(b"b")
    else:
        walk.alive[1].die(-9)
        walk.come_back()
    outcome = "result" if way == "ranks lost" else "cancelled"
    assert ends(walk) == [f"run of b: {outcome}", "unload: result"]


@pytest.mark.parametrize("begun", [True, False])
def test_ranks_are_told_of_the_end_of_runs_that_they_have(walk: Walk, begun: bool) -> None:
    """And of no others, of which there may be any number before the next command."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    if not begun:
        walk.submit(Verb.FORWARD, BASE, "forward")
    run = Job("run", b"b", 1, Verb.SAMPLE, "base", body_of(Verb.SAMPLE, BASE), 3)
    walk.executor.submit(run)
    walk.executor.poll()
    walk.executor.cancel("run")
    walk.answer()
    assert run.outcome is Outcome.CANCELLED
    walk.submit(Verb.FORWARD, BASE, "next")
    assert walk.work.body["forget"] == (["run"] if begun else [])


# --- little room for many models --------------------------------------------------------------------------------------

ONE_VARIANT = CONFIG.model_copy(update={"models": Models(variants=1)})


def content(number: int) -> Tensor:
    return Tensor("U8", (10,), (bytes([number]) * 10,)).with_digest()


def variant(number: int) -> Model:
    """A model with a patch of its own, as tensors in the store."""
    return Model(f"v{number}", "/base", "i", None, base=BASE, patches=[{"diff": content(number).without_bytes()}])


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Walk]:
    """Ranks that hold one variant, the first of two that were loaded."""
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path, config=ONE_VARIANT)
        walk.ready()
        for number in (1, 0):
            walk.executor.store.put(content(number))
            walk.submit(Verb.LOAD, variant(number), f"load {number}")
            walk.answer()
        walk.clock.now += 100
        yield walk


def fetched(walk: Walk, number: int) -> bool:
    """Whether the ranks are told to load a variant, in the place of the other one."""
    body = walk.work.body
    return (walk.work.type, body.get("model"), body.get("evict_models")) == ("load", f"v{number}", [f"v{1 - number}"])


def test_what_made_room_is_loaded_for_a_jobs_turn(one: Walk) -> None:
    assert one.executor.residency.recall("v1")
    one.submit(Verb.FORWARD, variant(1), "forward")
    assert fetched(one, 1)
    assert one.executor.loading is not None
    one.answer()
    assert (one.work.type, one.work.body["model"]) == ("forward", "v1")
    one.answer()
    assert [(job.id, job.outcome) for job in one.ended[2:]] == [("forward", Outcome.RESULT)]
    assert not one.executor.store._pins


def test_what_it_is_patched_with_stays_until_its_turn(one: Walk) -> None:
    one.submit(Verb.FORWARD, variant(0), "now", b"a")
    one.submit(Verb.FORWARD, variant(1), "later", b"b")
    one.executor.store.limit = 20
    with pytest.raises(QueueFull) as caught:
        one.executor.store.put_all([content(5), content(6)])
    assert caught.value.details["soon"]
    one.executor.store.put(content(5))
    one.answer()
    one.clock.now += 1
    one.executor.poll()
    assert fetched(one, 1)


def test_a_model_that_makes_room_while_a_job_waits_for_it_comes_back(one: Walk) -> None:
    """It was there when the job was queued."""
    one.submit(Verb.FORWARD, variant(0), "runs", b"a")
    one.submit(Verb.LOAD, variant(1), "load", b"b")
    one.submit(Verb.FORWARD, variant(0), "waits", b"a")
    one.answer()
    assert fetched(one, 1)
    one.answer()
    one.executor.store.put_all([content(number) for number in range(5, 9)])
    one.clock.now += 1
    one.executor.poll()
    assert fetched(one, 0)
    one.answer()
    assert (one.work.type, one.work.body["model"]) == ("forward", "v0")


def test_a_job_whose_models_tensors_are_gone_has_its_client_load_again(one: Walk) -> None:
    one.executor.store.limit = 10
    one.executor.store.put(content(9))
    assert one.executor.residency.recall("v1") is None
    one.submit(Verb.FORWARD, variant(1), "too late")
    assert isinstance(one.ended[-1].error, ModelNotFound)


@pytest.mark.parametrize("error", [ModelCorrupt("changed"), ModelNotFound("gone")])
def test_a_load_for_a_turn_that_fails_has_the_client_load_again(one: Walk, error: TacodError) -> None:
    one.submit(Verb.FORWARD, variant(1), "forward")
    one.answer("failed", {"error": error.to_wire()})
    assert isinstance(one.ended[-1].error, ModelNotFound)
    assert error.message in one.ended[-1].error.message
    assert one.executor.residency.recall("v1") is None
    assert not one.executor.store._pins
    assert one.executor.group.state is GroupState.IDLE


def test_a_load_for_a_turn_that_finds_no_memory_makes_more_room(one: Walk) -> None:
    one.submit(Verb.LOAD, OTHER, "other")
    one.answer()
    one.clock.now += 1
    one.submit(Verb.FORWARD, variant(1), "forward")
    assert fetched(one, 1)
    one.answer("failed", NO_MEMORY)
    assert one.work.body["evict_models"] == ["other"]
    one.answer()
    one.answer()
    assert (one.ended[-1].id, one.ended[-1].outcome) == ("forward", Outcome.RESULT)


def test_a_job_that_is_cancelled_while_its_model_comes_ends_with_that(one: Walk) -> None:
    one.submit(Verb.FORWARD, variant(1), "forward")
    assert one.executor.cancel("forward") is False
    one.answer()
    assert one.ended[-1].outcome is Outcome.CANCELLED
    assert ids(one) == ["base", "v1"]


def test_ranks_lost_while_a_model_comes_for_a_turn(one: Walk) -> None:
    one.submit(Verb.FORWARD, variant(1), "forward")
    one.alive[0].die(-9)
    one.come_back()
    for _ in range(4):
        one.answer()
    assert (one.ended[-1].id, one.ended[-1].outcome) == ("forward", Outcome.RESULT)


def test_a_model_whose_tensors_are_gone_is_not_restored(one: Walk) -> None:
    """Its client hears of that, and sends them again; nothing else is loaded under its id."""
    one.executor.store.limit = 10
    one.executor.store.put(content(9))
    one.alive[0].die(-9)
    one.come_back()
    assert one.work.body["model"] == "base"
    one.answer()
    assert ids(one) == ["base"]
    assert one.executor.residency.recall("v0") is None
    assert not one.executor.store._held


def test_a_run_goes_on_after_its_model_made_room(one: Walk) -> None:
    run = Job("run", b"a", 1, Verb.SAMPLE, "v0", body_of(Verb.SAMPLE, variant(0)), 3)
    one.executor.submit(run)
    one.executor.poll()
    one.submit(Verb.FORWARD, variant(1), "forward", b"b")
    done = []
    while run.outcome is None:
        done.append((one.work.type, one.work.body.get("step")))
        one.answer()
        one.clock.now += 1
        one.executor.poll()
    assert done == [("sample", 0), ("load", None), ("forward", None), ("load", None), ("sample", 1), ("sample", 2)]


def test_a_model_in_use_stays_as_long_as_its_load_took(one: Walk) -> None:
    """Others' loads wait; the client that uses it goes on, and so does nobody for ever."""
    one.submit(Verb.FORWARD, variant(1), "mine 0", b"a")
    one.clock.now += 2  # that is how long it takes
    one.answer()
    one.submit(Verb.FORWARD, variant(0), "yours", b"b")
    for number in range(1, 30):
        one.submit(Verb.FORWARD, variant(1), f"mine {number}", b"a")
        one.clock.now += 0.1
        one.answer()
        if one.work.type == "load":
            break
    assert 19 <= number <= 21
    assert fetched(one, 0)


def test_a_model_that_its_client_leaves_alone_makes_room_at_once(one: Walk) -> None:
    one.submit(Verb.FORWARD, variant(1), "mine", b"a")
    one.clock.now += 20
    one.answer()
    one.answer()
    one.submit(Verb.FORWARD, variant(0), "yours", b"b")
    assert one.executor.group.state is GroupState.IDLE
    assert one.executor.wakes_at
    one.clock.now += 0.3
    one.executor.poll()
    assert fetched(one, 0)


def test_a_client_need_not_wait_for_itself(one: Walk) -> None:
    one.submit(Verb.FORWARD, variant(1), "mine", b"a")
    one.clock.now += 20
    one.answer()
    one.answer()
    one.submit(Verb.FORWARD, variant(0), "mine too", b"a")
    assert fetched(one, 0)


@pytest.mark.parametrize("verb", [Verb.FORWARD, Verb.SAMPLE])
def test_a_step_that_finds_no_memory_is_done_in_the_place_of_an_idle_variant(walk: Walk, verb: Verb) -> None:
    walk.ready()
    for number in (1, 0):
        walk.executor.store.put(content(number))
        walk.submit(Verb.LOAD, variant(number), f"load {number}")
        walk.answer()
    walk.submit(verb, BASE, "job")
    gone = []
    while walk.ended[-1].id != "job":
        if walk.work.type == "evict":
            gone += walk.work.body["models"]
            walk.answer()
        else:
            walk.answer("failed", NO_MEMORY)
    assert gone == ["v1", "v0"]
    assert isinstance(walk.ended[-1].error, OutOfMemory)
    assert ids(walk) == ["base"]
    assert walk.executor.residency.recall("v1")


def test_a_run_goes_on_after_its_model_made_room_for_anothers_step(walk: Walk) -> None:
    walk.ready()
    for number in (1, 0):
        walk.executor.store.put(content(number))
        walk.submit(Verb.LOAD, variant(number), f"load {number}")
        walk.answer()
    run = Job("run", b"a", 1, Verb.SAMPLE, "v0", body_of(Verb.SAMPLE, variant(0)), 2)
    walk.executor.submit(run)
    walk.executor.poll()
    walk.submit(Verb.FORWARD, variant(1), "forward", b"b")
    walk.answer()
    assert (walk.work.type, walk.work.body["model"]) == ("forward", "v1")
    walk.answer("failed", NO_MEMORY)
    done = []
    while run.outcome is None:
        done.append((walk.work.type, walk.work.body.get("step"), walk.work.body.get("forget")))
        walk.answer()
    assert done == [("evict", None, []), ("forward", None, []), ("load", None, []), ("sample", 1, [])]


def test_a_model_that_made_room_is_forgotten_by_an_unload(one: Walk) -> None:
    one.submit(Verb.FORWARD, variant(1), "later")
    one.executor.cancel("later")
    while one.executor.scheduler.running is not None:
        one.answer()
    made_room = next(number for number in (0, 1) if f"v{number}" not in ids(one))
    one.submit(Verb.UNLOAD, variant(made_room), "unload")
    assert (one.ended[-1].id, one.ended[-1].outcome) == ("unload", Outcome.RESULT)
    assert one.executor.residency.recall(f"v{made_room}") is None


def test_roots_that_change_forget_what_made_room(one: Walk) -> None:
    one.executor.apply_config(ONE_VARIANT.model_copy(update={"models": Models(variants=1, roots=["/elsewhere"])}), [])
    assert one.executor.residency.recall("v1") is None


CLIENTS = (b"a", b"b", b"c")


class Turns(RuleBasedStateMachine):
    """Clients with a variant each, which load it again whenever that is asked of them, and ranks with room for few."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        logging.disable(logging.CRITICAL)
        self.stack.callback(logging.disable, logging.NOTSET)
        self.folder = Path(tempfile.mkdtemp(prefix="tacod-"))
        self.stack.callback(shutil.rmtree, self.folder)
        self.jobs = 0
        self.asked: dict[bytes, Job] = {}
        """What each client waits for."""
        self.reloads = 0

    @initialize(variants=st.integers(1, 2), tensors=st.integers(2, 3))
    def begin(self, variants: int, tensors: int) -> None:
        models = Models(variants=variants)
        self.walk = Walk(self.stack, self.folder, config=CONFIG.model_copy(update={"models": models}))
        self.walk.executor._on_end = self.on_end  # type: ignore[method-assign]
        self.walk.executor.store.limit = 10 * tensors
        self.variants = variants
        self.walk.ready()

    @property
    def executor(self) -> Executor:
        return self.walk.executor

    def on_end(self, executor: Executor, job: Job, step: Stepped | None) -> None:
        assert self.asked.pop(job.session) is job
        if isinstance(job.error, ModelNotFound):
            self.reloads += 1
        elif job.error is not None:
            assert isinstance(job.error, (RankFailed, Cancelled))

    def submit(self, session: bytes, verb: Verb, steps: int = 1) -> None:
        """As `Verbs` and the client do: what lacks is uploaded, and a model that is gone is loaded first."""
        number = CLIENTS.index(session)
        model = variant(number)
        if verb in (Verb.FORWARD, Verb.SAMPLE) and self.executor.residency.recall(model.id) is None:
            verb = Verb.LOAD
        if verb is Verb.LOAD:
            if self.executor.store.lacks(model.digests):
                self.executor.store.claim(session, model.digests, self.walk.clock.now)
                try:
                    self.executor.store.put(content(number), session, self.walk.clock.now)
                except QueueFull:
                    return
            self.executor.store.disclaim(session)
        self.jobs += 1
        steps = steps if verb is Verb.SAMPLE else 1
        digests = model.digests if verb is Verb.LOAD else []
        job = Job(str(self.jobs), session, 0, verb, model.id, body_of(verb, model), steps, digests=digests)
        self.executor.submit(job)
        self.asked[session] = job
        self.executor.poll()

    @rule(
        session=st.sampled_from(CLIENTS),
        verb=st.sampled_from([Verb.LOAD, Verb.FORWARD, Verb.SAMPLE]),
        steps=st.integers(1, 4),
    )
    def ask(self, session: bytes, verb: Verb, steps: int) -> None:
        if session not in self.asked and not self.executor.given_up:
            self.submit(session, verb, steps)

    @rule(kind=st.sampled_from(["done", "done", "done", "failed"]))
    def answer(self, kind: str) -> None:
        if self.executor.group.state is GroupState.BUSY:
            self.check_work()
            short = kind == "failed" and self.walk.work.type == "load" and len(ids(self.walk)) > 2
            self.walk.answer("failed", NO_MEMORY) if short else self.walk.answer()

    def check_work(self) -> None:
        """What goes isn't what is worked on, nor what that was made of."""
        work = self.walk.work
        gone = work.body.get("evict_models", [])
        if work.type == "load":
            assert {work.body["model"], work.body["base"]}.isdisjoint(gone)
        elif work.type in ("forward", "sample"):
            running = self.executor.scheduler.running
            assert running is not None
            assert running.model in self.executor.manifest

    @rule(session=st.sampled_from(CLIENTS))
    def cancel(self, session: bytes) -> None:
        if session in self.asked:
            self.executor.cancel(self.asked[session].id)

    @rule(number=st.integers(10, 20))
    def fill(self, number: int) -> None:
        """Somebody's conditioning."""
        with suppress(QueueFull):
            self.executor.store.put(content(number), b"somebody", self.walk.clock.now)

    @rule(seconds=st.sampled_from([0.01, 0.3, 6.0]))
    def wait(self, seconds: float) -> None:
        self.walk.clock.now += seconds
        self.executor.poll()

    @precondition(lambda self: self.walk.alive and self.executor.group.restarts < RESTARTS)
    @rule()
    def die(self) -> None:
        self.walk.alive[0].die(-9)
        self.walk.come_back()

    @invariant()
    def what_is_kept_is_there(self) -> None:
        if not hasattr(self, "walk"):
            return
        store = self.executor.store
        assert all(digest in store for digest in store._pins)
        pins: Counter[bytes] = Counter()
        for job in self.executor.scheduler.jobs:
            pins.update([*job.digests, *job.restores])
        assert store._pins == pins
        assert store._held == Counter(digest for model in self.executor.manifest for digest in model.digests)

    @invariant()
    def no_more_variants_than_may_be(self) -> None:
        if hasattr(self, "walk"):
            assert sum(model.base is not None for model in self.executor.manifest) <= self.variants

    def teardown(self) -> None:
        """From here on each client has six forwards or a run done, all at once, and nobody waits for ever."""
        try:
            if hasattr(self, "walk") and not self.executor.given_up:
                self.finish()
        finally:
            self.stack.close()

    def finish(self) -> None:
        for session in [session for session in CLIENTS if session in self.asked]:
            self.executor.cancel(self.asked[session].id)
        done: Counter[bytes] = Counter()
        for _ in range(400):
            for session in CLIENTS:
                if session not in self.asked and done[session] < 6:
                    before = self.jobs
                    self.submit(session, Verb.SAMPLE if session == b"c" else Verb.FORWARD, 3)
                    if self.jobs > before and session in self.asked:
                        done[session] += self.asked[session].verb is not Verb.LOAD
            if not self.asked and min(done[session] for session in CLIENTS) >= 6:
                break
            self.walk.clock.now += 0.02 if self.walk.alive else 40
            self.executor.poll()
            self.walk.ready()
            if self.executor.group.state is GroupState.BUSY:
                self.check_work()
                self.walk.answer()
        else:
            raise AssertionError(f"clients that wait for ever: {done}, {self.asked}")
        assert not self.executor.store._pins


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
