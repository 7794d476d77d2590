"""The queue as a state machine: one end for each job, one step at a time, turns for all, within its bounds."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tacod.execution.scheduler import Job, Outcome, Scheduler, Verb
from tacod.group.work import Unload
from tacod_client.errors import (
    Cancelled,
    JobNotFound,
    OutOfMemory,
    QueueFull,
    RankFailed,
    TacodError,
    Unavailable,
)

RETRIES = 2


def job(name: str, session: bytes = b"a", steps: int = 1, verb: Verb = Verb.SAMPLE) -> Job:
    return Job(name, session, 0, verb, "model", Unload("model"), steps)


def queue(*jobs: Job, limit: int = 8) -> Scheduler:
    scheduler = Scheduler(limit, RETRIES)
    for each in jobs:
        scheduler.submit(each)
    return scheduler


def start(scheduler: Scheduler) -> Job:
    """Start the next step; there must be one."""
    started = scheduler.next(0.0)
    assert started is not None
    return started


def run(scheduler: Scheduler) -> list[str]:
    """Run to the end; the jobs' names, a name for each step."""
    order = []
    while (started := scheduler.next(0.0)) is not None:
        order.append(started.id)
        scheduler.finish_step()
    return order


# --- who runs when ----------------------------------------------------------------------------------------------------


def test_nothing_runs_when_nothing_waits() -> None:
    assert queue().next(0.0) is None


def test_one_step_runs_at_a_time() -> None:
    scheduler = queue(job("1"), job("2", b"b"))
    start(scheduler)
    assert scheduler.next(0.0) is None


def test_a_job_takes_all_its_steps_and_then_ends_with_a_result() -> None:
    only = job("1", steps=3)
    scheduler = queue(only)
    ends = []
    for _ in range(3):
        start(scheduler)
        ends.append(scheduler.finish_step())
    assert ends == [None, None, only]
    assert (only.outcome, only.error, only.step) == (Outcome.RESULT, None, 3)
    assert scheduler.jobs == []


def test_two_sessions_alternate_step_by_step() -> None:
    assert run(queue(job("a", b"a", 3), job("b", b"b", 3))) == ["a", "b"] * 3


def test_a_forward_waits_for_one_step_of_a_long_run() -> None:
    scheduler = queue(job("run", b"a", 28))
    start(scheduler)
    scheduler.submit(job("forward", b"b", verb=Verb.FORWARD))
    scheduler.finish_step()
    assert start(scheduler).id == "forward"


def test_many_jobs_of_one_session_do_not_crowd_out_another() -> None:
    scheduler = queue(*(job(f"a{n}", b"a") for n in range(4)), job("b0", b"b"), job("b1", b"b"))
    assert run(scheduler) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_jobs_of_one_session_keep_their_order() -> None:
    assert run(queue(job("1", steps=2), job("2"), job("3", steps=2))) == ["1", "1", "2", "3", "3"]


def test_jobs_are_listed_in_the_order_in_which_they_start() -> None:
    scheduler = queue(*(job(f"a{n}", b"a") for n in range(3)), job("b0", b"b"), job("c0", b"c"))
    listed = [each.id for each in scheduler.jobs]
    assert run(scheduler) == listed


def test_who_is_put_off_keeps_his_place() -> None:
    scheduler = queue(job("a", b"a", 2), job("b", b"b"), job("c", b"c", 2))
    order = []
    while (started := scheduler.next(0.0, lambda job: job.id == "b" and len(order) < 3)) is not None:
        order.append(started.id)
        scheduler.finish_step()
    assert order == ["a", "c", "a", "b", "c"]


def test_nobody_starts_while_all_are_put_off() -> None:
    scheduler = queue(job("a"))
    assert scheduler.next(0.0, lambda job: True) is None
    assert run(scheduler) == ["a"]


def test_start_is_noted_once() -> None:
    only = job("1", steps=2)
    scheduler = queue(only)
    scheduler.next(5.0)
    scheduler.finish_step()
    scheduler.next(9.0)
    assert only.started_s == 5.0


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_queue_is_full_at_its_limit_and_names_it() -> None:
    scheduler = queue(job("1"), job("2", b"b"), limit=2)
    with pytest.raises(QueueFull, match=r"limits\.queue") as caught:
        scheduler.submit(job("3", b"c"))
    assert caught.value.details == {"limit": 2}
    assert [each.id for each in scheduler.jobs] == ["1", "2"]


def test_running_job_counts_against_the_limit() -> None:
    scheduler = queue(job("1"), limit=1)
    start(scheduler)
    with pytest.raises(QueueFull):
        scheduler.submit(job("2"))
    scheduler.finish_step()
    scheduler.submit(job("2"))


def test_draining_takes_no_new_work_and_finishes_the_old() -> None:
    scheduler = queue(job("1", steps=2), job("2", b"b"))
    scheduler.draining = True
    with pytest.raises(Unavailable, match="draining"):
        scheduler.submit(job("3"))
    assert run(scheduler) == ["1", "2", "1"]


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_what_is_cancelled_in_the_queue_never_starts() -> None:
    waiting = job("2", b"b")
    scheduler = queue(job("1"), waiting)
    assert scheduler.cancel("2") == [waiting]
    assert waiting.outcome is Outcome.CANCELLED
    assert isinstance(waiting.error, Cancelled)
    assert run(scheduler) == ["1"]


def test_what_is_cancelled_running_ends_with_its_step() -> None:
    running = job("1", steps=5)
    scheduler = queue(running)
    start(scheduler)
    assert scheduler.cancel("1") == []
    assert running.outcome is None
    assert scheduler.finish_step() is running
    assert running.outcome is Outcome.CANCELLED
    assert scheduler.next(0.0) is None


def test_what_is_cancelled_between_two_steps_ends_at_once() -> None:
    between = job("1", steps=5)
    scheduler = queue(between)
    start(scheduler)
    scheduler.finish_step()
    assert scheduler.cancel("1") == [between]
    assert between.error is not None
    assert "step 1 of 5" in between.error.message


def test_cancelling_twice_ends_once() -> None:
    running = job("1")
    scheduler = queue(running)
    start(scheduler)
    assert scheduler.cancel("1") == scheduler.cancel("1") == []
    assert scheduler.finish_step() is running
    with pytest.raises(JobNotFound):
        scheduler.cancel("1")


def test_cancelling_an_unknown_job_names_it() -> None:
    with pytest.raises(JobNotFound, match="'nope'") as caught:
        queue(job("1")).cancel("nope")
    assert caught.value.details == {"job": "nope"}


def test_cancelled_job_whose_step_fails_counts_as_cancelled() -> None:
    scheduler = queue(job("1"))
    start(scheduler)
    scheduler.cancel("1")
    assert scheduler.fail_step(OutOfMemory("no memory")).outcome is Outcome.CANCELLED


def test_cancelled_job_whose_ranks_die_is_not_retried() -> None:
    running = job("1")
    scheduler = queue(running)
    start(scheduler)
    scheduler.cancel("1")
    assert scheduler.lose_group("rank 1 died") == [running]
    assert running.outcome is Outcome.CANCELLED


def test_dropped_session_loses_its_queue_now_and_its_step_later() -> None:
    running, waiting, other = job("1", steps=3), job("2"), job("3", b"b")
    scheduler = queue(running, waiting)
    start(scheduler)
    scheduler.submit(other)
    assert scheduler.drop(b"a") == [waiting]
    assert scheduler.finish_step() is running
    assert running.outcome is waiting.outcome is Outcome.CANCELLED
    assert run(scheduler) == ["3"]


def test_dropping_an_unknown_session_harms_nobody() -> None:
    scheduler = queue(job("1"))
    assert scheduler.drop(b"nobody") == []
    assert run(scheduler) == ["1"]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_failed_step_ends_its_job_with_the_error_and_no_other() -> None:
    scheduler = queue(job("1", steps=2), job("2", b"b"))
    start(scheduler)
    failed = scheduler.fail_step(error := OutOfMemory("no memory"))
    assert (failed.id, failed.outcome, failed.error) == ("1", Outcome.FAILED, error)
    assert run(scheduler) == ["2"]


def test_lost_step_is_run_again_before_all_others() -> None:
    scheduler = queue(job("1"), job("2", b"b"))
    start(scheduler)
    assert scheduler.lose_group("rank 1 died") == []
    assert run(scheduler) == ["1", "2"]


def test_lost_job_begins_again_from_its_own_inputs() -> None:
    lost, between = job("1", b"a", 3), job("2", b"b", 3)
    scheduler = queue(lost, between)
    for _ in range(2):
        start(scheduler)
        scheduler.finish_step()
    start(scheduler)
    scheduler.lose_group("rank 1 died")
    assert (lost.step, between.step) == (0, 0)
    assert (lost.attempts, between.attempts) == (2, 1)


def test_lost_job_goes_on_behind_the_steps_that_are_kept() -> None:
    """And its tries count from there: a run of many hours has all of them for each step."""
    lost, between = job("1", b"a", 9), job("2", b"b", 3)
    scheduler = queue(lost, between)
    for kept in range(1, 5):
        assert start(scheduler) is lost
        lost.kept, lost.tries, lost.cause = kept, 1, ""
        scheduler.finish_step()
        assert (lost.step, lost.begins) == (kept, False)
        if kept == 1:
            start(scheduler)
            scheduler.finish_step()
            scheduler.cancel("2")
        for _ in range(RETRIES):
            start(scheduler)
            assert scheduler.lose_group("rank 1 died") == []
            assert (lost.step, lost.begins) == (kept, True)
    assert lost.attempts == 1 + 4 * RETRIES
    start(scheduler)
    assert scheduler.lose_group("rank 1 died") == [lost]


def test_lost_job_fails_after_its_retries_and_says_why() -> None:
    lost = job("1", verb=Verb.FORWARD)
    scheduler = queue(lost)
    for _ in range(RETRIES):
        start(scheduler)
        assert scheduler.lose_group("rank 1 was killed by SIGKILL") == []
    start(scheduler)
    assert scheduler.lose_group("rank 2 was killed by SIGSEGV") == [lost]
    assert lost.outcome is Outcome.FAILED
    assert isinstance(lost.error, RankFailed)
    assert lost.error.message.startswith("forward failed 3 times")
    assert lost.error.message.endswith("rank 2 was killed by SIGSEGV")
    assert lost.error.details == {"attempts": RETRIES + 1}


def test_what_ends_the_ranks_twice_in_the_same_way_is_not_tried_again() -> None:
    lost = job("1", verb=Verb.SAMPLE)
    scheduler = queue(lost)
    start(scheduler)
    assert scheduler.lose_group("rank 1 raised", cause="ValueError: #") == []
    start(scheduler)
    assert scheduler.lose_group("rank 0 raised", cause="ValueError: #") == [lost]
    assert isinstance(lost.error, RankFailed)
    assert lost.error.message.startswith("sample failed 2 times")
    assert lost.error.details == {"attempts": 2}


@pytest.mark.parametrize("causes", [("ValueError: #", "TypeError: #"), ("", ""), ("ValueError: #", "")])
def test_other_ends_are_no_reason_to_stop_early(causes: tuple[str, str]) -> None:
    lost = job("1")
    scheduler = queue(lost)
    for cause in causes:
        start(scheduler)
        assert scheduler.lose_group("lost", cause=cause) == []
    assert run(scheduler) == ["1"]


def test_losing_idle_ranks_costs_no_attempt() -> None:
    waiting = job("1")
    scheduler = queue(waiting)
    assert scheduler.lose_group("rank 1 died") == []
    assert waiting.attempts == 1


def test_giving_up_ends_all_jobs_each_with_its_due() -> None:
    running, waiting = job("1"), job("2", b"b")
    scheduler = queue(running, waiting)
    start(scheduler)
    scheduler.cancel("1")
    assert scheduler.fail_all(error := Unavailable("stopped")) == [running, waiting]
    assert running.outcome is Outcome.CANCELLED
    assert (waiting.outcome, waiting.error) == (Outcome.FAILED, error)
    assert scheduler.jobs == []
    assert scheduler.running is None


# --- any order of events ----------------------------------------------------------------------------------------------

SESSIONS = st.sampled_from([b"a", b"b", b"c"])


class Events(RuleBasedStateMachine):
    """Whatever happens in whatever order."""

    @initialize(limit=st.integers(1, 6))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.scheduler = Scheduler(limit, RETRIES)
        self.all: list[Job] = []
        self.ended: list[Job] = []
        self.passed: Counter[tuple[bytes, bytes]] = Counter()
        """How often the second session had a turn while the first one waited. A turn that was lost is none."""
        self.this_turn: list[tuple[bytes, bytes]] = []

    def end(self, jobs: list[Job]) -> None:
        for each in jobs:
            assert all(each is not other for other in self.ended), "a job ended twice"
            assert each.outcome is not None
            assert (each.error is None) == (each.outcome is Outcome.RESULT)
            if each.outcome is Outcome.RESULT:
                assert each.step == each.steps
                assert not each.cancelling
            self.ended.append(each)

    def waits(self, session: bytes) -> bool:
        return any(each.session == session and each is not self.scheduler.running for each in self.scheduler.jobs)

    @rule(session=SESSIONS, steps=st.integers(1, 4), verb=st.sampled_from(Verb))
    def submit(self, session: bytes, steps: int, verb: Verb) -> None:
        new = job(str(len(self.all)), session, steps, verb)
        before = len(self.scheduler.jobs)
        try:
            self.scheduler.submit(new)
        except Unavailable:
            refused: type[TacodError] | None = Unavailable
        except QueueFull:
            refused = QueueFull
        else:
            refused = None
            self.all.append(new)
        expected = Unavailable if self.scheduler.draining else QueueFull if before == self.limit else None
        assert refused is expected

    @rule()
    def next(self) -> None:
        running, jobs = self.scheduler.running, self.scheduler.jobs
        started = self.scheduler.next(0.0)
        if running is not None or not jobs:
            assert started is None
            return
        assert started is jobs[0], "jobs are listed in the order in which they start"
        assert self.scheduler.running is started
        others = {each.session for each in self.scheduler.jobs} - {started.session}
        self.this_turn = [(session, started.session) for session in others]
        self.passed.update(self.this_turn)
        for pair in [pair for pair in self.passed if pair[0] == started.session]:
            del self.passed[pair]

    @precondition(lambda self: self.scheduler.running is not None)
    @rule()
    def finish_step(self) -> None:
        ended = self.scheduler.finish_step()
        self.end([ended] if ended else [])

    @precondition(lambda self: self.scheduler.running is not None)
    @rule()
    def fail_step(self) -> None:
        self.end([self.scheduler.fail_step(OutOfMemory("no memory"))])

    @rule()
    def lose_group(self) -> None:
        running = self.scheduler.running
        self.end(self.scheduler.lose_group("rank 1 died"))
        if running is not None and running.outcome is None:
            self.passed.subtract(pair for pair in self.this_turn if pair in self.passed)
        assert all(each.step == 0 for each in self.scheduler.jobs)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.all))
        if chosen.outcome is not None:
            with pytest.raises(JobNotFound):
                self.scheduler.cancel(chosen.id)
            return
        running = chosen is self.scheduler.running
        ended = self.scheduler.cancel(chosen.id)
        assert ended == ([] if running else [chosen])
        self.end(ended)

    @rule(session=SESSIONS)
    def drop(self, session: bytes) -> None:
        ended = self.scheduler.drop(session)
        assert all(each.session == session for each in ended)
        assert not self.waits(session)
        self.end(ended)

    @precondition(lambda self: len(self.all) > 5)
    @rule()
    def drain(self) -> None:
        self.scheduler.draining = True

    @precondition(lambda self: len(self.ended) > 3)
    @rule()
    def give_up(self) -> None:
        self.end(self.scheduler.fail_all(Unavailable("given up")))
        assert self.scheduler.jobs == []

    @invariant()
    def every_job_is_somewhere_once(self) -> None:
        here = self.scheduler.jobs
        assert {id(each) for each in here}.isdisjoint(id(each) for each in self.ended)
        assert sorted(each.id for each in here + self.ended) == sorted(each.id for each in self.all)
        assert all(each.outcome is None for each in here)
        assert len(self.scheduler) == len(here) - (self.scheduler.running is not None)

    @invariant()
    def bounds_are_kept(self) -> None:
        assert len(self.scheduler.jobs) <= self.limit
        assert all(each.attempts <= RETRIES + 1 for each in self.all)
        assert all(each.step < each.steps for each in self.scheduler.jobs)

    @invariant()
    def nobody_is_passed_twice(self) -> None:
        for pair in [pair for pair in self.passed if not self.waits(pair[0])]:
            del self.passed[pair]
        assert all(turns <= 1 for turns in self.passed.values())

    def teardown(self) -> None:
        """However it went, what is left can be run to its end."""
        if hasattr(self, "scheduler"):
            while self.scheduler.jobs:
                self.scheduler.next(0.0)
                self.finish_step()
            assert len(self.ended) == len(self.all)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
