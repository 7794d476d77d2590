"""Ranks and queue together, in any order of events: what becomes of jobs, and of the ranks.

The ranks are fakes. Everything between a submitted job and its end is the real thing.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tacod.config import Config
from tacod.executor import Executor
from tacod.group import State
from tacod.manifest import Model
from tacod.scheduler import Job, Outcome, Verb
from tacod_client.errors import JobNotFound, ModelUnsupported, OutOfMemory, QueueFull, RankFailed, Unavailable
from tacod_client.wire import Message

from .fake_ranks import FACTS, FakeRank, descriptors, fakes, step

RANKS = 3
LIMIT = 4
RETRIES = 1
RESTARTS = 6
SESSIONS = st.sampled_from([b"a", b"b"])
RANK = st.integers(0, RANKS - 1)
ANSWERS: dict[str, dict[str, Any]] = {
    "load": {"model": FACTS, "base": FACTS, "compute_s": 0.0, "collective_s": 0.0},
    "unload": {"compute_s": 0.0, "collective_s": 0.0},
    "forward": step(RANKS),
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
        self.said: dict[int, set[str]] = {}
        """How ranks have answered each work item."""

    @initialize(loaded=st.booleans())
    def begin(self, loaded: bool) -> None:
        model = Model("m", "/models/m", "i", None)
        devices = [f"cpu:{index}" for index in range(RANKS)]
        self.executor = Executor(CONFIG, devices, [model] if loaded else [], self.folder, self.on_progress, self.on_end)
        self.executor.attend()

    def on_progress(self, job: Job, body: dict[str, Any]) -> None:
        assert all(job is not each for each in self.ended), "progress after the end"

    def on_end(self, job: Job, answer: dict[str, Any]) -> None:
        assert all(job is not each for each in self.ended), "a job ended twice"
        assert (job.error is None) == (job.outcome is Outcome.RESULT)
        if job.outcome is Outcome.RESULT and job.verb is Verb.LOAD and not answer:
            assert job.model in self.executor.manifest, "it was there already"
        elif job.outcome is Outcome.RESULT:
            assert answer or job.verb is Verb.UNLOAD
            assert self.said[self.executor.group._work] == {"done"}, "the ranks don't agree on a result"
        self.ended.append(job)

    @property
    def alive(self) -> list[FakeRank]:
        return [rank for rank in FakeRank.all if not rank.reaped]

    # --- clients --------------------------------------------------------------------------------------------------

    @rule(session=SESSIONS, verb=st.sampled_from(Verb), steps=st.integers(1, 3))
    def submit(self, session: bytes, verb: Verb, steps: int) -> None:
        body: Any = {"model": "m", "arguments": {}}
        if verb is Verb.LOAD:
            body = Model("m", "/models/m", "i", None)
        job = Job(str(len(self.submitted)), session, 0, verb, "m", body, steps if verb is Verb.SAMPLE else 1)
        refused = Unavailable if self.executor.given_up else QueueFull
        if self.executor.given_up or len(self.executor.scheduler.jobs) == LIMIT:
            with pytest.raises(refused):
                self.executor.submit(job)
        else:
            self.executor.submit(job)
            self.submitted.append(job)
        self.executor.attend()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.submitted))
        if job.outcome is not None:
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
        self.executor.attend()

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

    @rule(index=RANK)
    def finish(self, index: int) -> None:
        self.answer(index, "done")
        self.executor.attend()

    @rule()
    def all_finish(self) -> None:
        for index in range(RANKS):
            self.answer(index, "done")
        self.executor.attend()

    @rule(index=RANK, error=st.sampled_from([OutOfMemory("no memory"), ModelUnsupported("a UNet")]))
    def fail(self, index: int, error: Any) -> None:
        self.answer(index, "failed", {"error": error.to_wire()})
        self.executor.attend()

    @rule(error=st.sampled_from([OutOfMemory("no memory"), ModelUnsupported("a UNet")]))
    def all_fail(self, error: Any) -> None:
        pids = [rank.pid for rank in self.alive]
        busy = self.executor.group.state is State.BUSY and all(rank.unanswered for rank in self.alive)
        for index in range(RANKS):
            self.answer(index, "failed", {"error": error.to_wire()})
        self.executor.attend()
        if busy and all(rank.code is None for rank in self.alive):
            assert [rank.pid for rank in self.alive] == pids, "ranks that agree stay"

    @rule(index=RANK)
    def break_down(self, index: int) -> None:
        self.answer(index, "broken", {"traceback": "Traceback"})
        self.executor.attend()

    @rule(index=RANK, code=st.sampled_from([-9, -11, 3]))
    def die(self, index: int, code: int) -> None:
        for rank in self.alive:
            if rank.index == index:
                rank.die(code)
        self.executor.attend()
        assert all(rank.code is None for rank in self.alive), "a dead rank takes all others with it"

    @rule(index=RANK, kind=st.sampled_from(["ready", "done", "failed", "broken", "progress", "begun", "no such thing"]))
    def die_talking(self, index: int, kind: str) -> None:
        """A rank's last words, whatever they are, don't outlive it."""
        body = {"memory_used_bytes": 7, "done": 1, "total": 2, "traceback": "", **step(RANKS, sigma=0.5)}
        body |= {"error": OutOfMemory("no memory").to_wire(), "model": FACTS, "base": FACTS}
        ended = len(self.ended)
        for rank in self.alive:
            if rank.index == index:
                rank.say(kind, body, self.executor.group._work)
                rank.die(-9)
        self.executor.attend()
        assert all(rank.code is None for rank in self.alive), "a dead rank takes all others with it"
        assert all(job.error is not None for job in self.ended[ended:])

    @rule(index=RANK, done=st.integers(0, 3))
    def go_on(self, index: int, done: int) -> None:
        """A rank says that it is still at work."""
        for rank in self.alive:
            if rank.index == index:
                for work in rank.unanswered:
                    rank.say("begun", {}, work.id)
                    rank.say("progress", {"done": done, "total": 3}, work.id)
        self.executor.attend()

    # --- the clock ------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.executor.attend()

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def every_job_is_somewhere_once(self) -> None:
        if hasattr(self, "executor"):
            here = self.executor.scheduler.jobs
            assert sorted(job.id for job in here + self.ended) == sorted(job.id for job in self.submitted)
            assert len(here) <= LIMIT
            assert all(job.attempts <= RETRIES + 1 for job in self.submitted)
            assert sum(self.executor.metrics.jobs_total.values()) == len(self.ended)

    @invariant()
    def one_work_item_is_with_the_ranks(self) -> None:
        if hasattr(self, "executor"):
            executor = self.executor
            busy = executor.group.state is State.BUSY
            assert busy == (executor.scheduler.running is not None or executor.residency.restoring is not None)
            assert not (executor.scheduler.running is not None and executor.residency.restoring is not None)
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
                assert job.attempts == RETRIES + 1

    def teardown(self) -> None:
        """However it went, ranks that behave bring what is left to its end."""
        try:
            for _ in range(200):
                if not self.executor.scheduler.jobs:
                    break
                self.clock.now += 40 if not self.alive else 0
                self.executor.attend()
                for rank in self.alive:
                    if not rank.unanswered and rank.greeted and self.executor.group.state is State.BUSY:
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

    def __init__(self, stack: ExitStack, folder: Path, preload: tuple[Model, ...] = ()) -> None:
        self.clock = stack.enter_context(fakes())
        self.ended: list[Job] = []
        devices = [f"cpu:{index}" for index in range(RANKS)]
        self.executor = Executor(
            CONFIG, devices, list(preload), folder, lambda *told: None, lambda job, _: self.ended.append(job)
        )
        stack.callback(self.executor.close)
        self.executor.attend()

    @property
    def alive(self) -> list[FakeRank]:
        return [rank for rank in FakeRank.all if not rank.reaped]

    def ready(self) -> None:
        for rank in self.alive:
            rank.greet()
        self.executor.attend()

    @property
    def work(self) -> Message:
        """What the ranks were told last."""
        return self.alive[0].heard[-1]

    def answer(self, kind: str = "done", body: dict[str, Any] | None = None, ranks: int = RANKS) -> None:
        told = ANSWERS[self.work.type] if body is None else body
        for rank in self.alive[:ranks]:
            rank.answer(kind, told)
        self.executor.attend()

    def come_back(self) -> None:
        """The ranks are replaced."""
        gone = self.alive
        while not self.alive or self.alive[0] is gone[0]:
            self.clock.now += 1
            self.executor.attend()
        self.ready()

    def submit(self, verb: Verb, model: Model, job: str = "j", session: bytes = b"a") -> None:
        body: Any = model if verb is Verb.LOAD else {"model": model.id, "arguments": {}}
        self.executor.submit(Job(job, session, 1, verb, model.id, body, 1))
        self.executor.attend()


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
    walk.executor.attend()  # what it left unread is an error first
    walk.executor.attend()
    assert len(before - set(walk.executor.group.sources)) == 1
    assert walk.executor.group.state is State.BUSY
    gone = walk.alive
    walk.clock.now += CONFIG.group.load_timeout_s + 1
    walk.executor.attend()
    assert all(rank.reaped for rank in gone)


def busy_with(walk: Walk, verb: Verb) -> list[FakeRank]:
    """The ranks, at work on a load or, once the model is there, something else."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    if verb is not Verb.LOAD:
        walk.answer()
        walk.submit(verb, BASE, "work")
    return walk.alive


def pass_by(walk: Walk, seconds: float) -> None:
    walk.clock.now += seconds
    walk.executor.attend()


@pytest.mark.parametrize("verb", [Verb.FORWARD, Verb.SAMPLE])
def test_each_forward_of_a_step_has_its_own_time(walk: Walk, verb: Verb) -> None:
    """A graph's capture is one more, and so are a second evaluation and a guidance's other condition."""
    ranks = busy_with(walk, verb)
    for _ in range(3):
        for rank in ranks:
            rank.say("begun", {}, walk.work.id)
        pass_by(walk, CONFIG.group.step_timeout_s - 1)
    # Launched early, as on a GPU: their times follow one another.
    for rank in ranks:
        for _ in range(2):
            rank.say("begun", {}, walk.work.id)
    pass_by(walk, 3 * CONFIG.group.step_timeout_s)
    assert walk.executor.group.state is State.BUSY
    walk.answer()
    assert walk.ended[-1].outcome is Outcome.RESULT
    assert walk.ended[-1].attempts == 1


def test_a_rank_that_hangs_in_a_later_forward_is_found(walk: Walk) -> None:
    ranks = busy_with(walk, Verb.SAMPLE)
    for rank in ranks:
        rank.say("begun", {}, walk.work.id)
    pass_by(walk, 2 * CONFIG.group.step_timeout_s - 1)
    assert walk.executor.group.state is State.BUSY
    pass_by(walk, 2)
    assert all(rank.reaped for rank in ranks)


def test_a_rank_that_hangs_is_found_although_the_others_go_on(walk: Walk) -> None:
    """The others' answers extend nothing either."""
    ranks = busy_with(walk, Verb.SAMPLE)
    for rank in ranks[1:]:
        for _ in range(9):
            rank.say("begun", {}, walk.work.id)
    walk.executor.attend()
    ranks[2].answer("done", ANSWERS["sample"])
    pass_by(walk, CONFIG.group.step_timeout_s + 1)
    assert all(rank.reaped for rank in ranks)


def test_a_load_that_gets_on_has_all_the_time(walk: Walk) -> None:
    """A slow disk is no fault; only one that stands still is."""
    ranks = busy_with(walk, Verb.LOAD)
    for done in range(1, 6):
        for rank in ranks:
            rank.say("progress", {"done": done, "total": 6}, walk.work.id)
        walk.executor.attend()
        pass_by(walk, CONFIG.group.load_timeout_s - 1)
        assert walk.executor.group.state is State.BUSY
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
    walk.executor.attend()
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
    walk.executor.attend()
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


def test_a_reload_does_not_load_again_what_is_being_loaded(tmp_path: Path) -> None:
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path, preload=(BASE,))
        walk.ready()
        walk.executor.go_by(CONFIG, [BASE, OTHER])
        walk.answer()
        assert walk.work.body["model"] == "other"
        walk.answer()
        assert walk.executor.group.state is State.IDLE
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
    assert walk.executor.group.state is State.IDLE
    assert ids(walk) == ["base"]


def test_a_run_whose_model_went_and_came_back_begins_anew(walk: Walk) -> None:
    """The ranks know nothing of it any more."""
    walk.ready()
    walk.submit(Verb.LOAD, BASE, "load")
    walk.answer()
    run = Job("run", b"b", 1, Verb.SAMPLE, "base", {"model": "base"}, 3)
    walk.executor.submit(run)
    walk.executor.attend()
    walk.submit(Verb.UNLOAD, BASE, "unload")
    walk.submit(Verb.LOAD, BASE, "again", b"c")
    walk.answer()  # its first step
    assert (walk.work.type, run.step) == ("unload", 1)
    walk.answer()
    while walk.work.type != "sample":
        walk.answer()
    assert walk.work.body["step"] == 0
