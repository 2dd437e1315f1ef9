"""The scheduler, for any order of arrivals, cancellations, failures and deadlines."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qie.engines.serving.scheduler import Complete, Prepare, Scheduler, Step, Work

BUCKETS, CLIENTS = "ABC", ("ann", "bob", "cyd")


def scheduler(batch_max: int = 4, running_max: int = 8, waiting_max: int = 100, *, swaps: bool = False) -> Scheduler:
    return Scheduler(batch_max=batch_max, running_max=running_max, waiting_max=waiting_max, swaps=swaps)


def work_of(queue: Scheduler, most: int = 1000) -> list[Work]:
    """All work until nothing is left."""
    done: list[Work] = []
    while (work := queue.next()) is not None:
        queue.done(work)
        done.append(work)
        assert len(done) < most, "it does not end"
    return done


class Machine(RuleBasedStateMachine):
    """What comes, goes and is done in any order, with an account of every edit."""

    swaps = False

    def __init__(self) -> None:
        super().__init__()
        self.queue = scheduler(batch_max=3, running_max=5, waiting_max=6, swaps=self.swaps)
        self.alive: dict[int, tuple[str, int, float]] = {}
        self.seen: dict[int, list[type[Work]]] = {}
        self.number, self.now = 0, 0.0
        self.completed: set[int] = set()
        self.since_step: Counter[str] = Counter()

    @rule(
        bucket=st.sampled_from(BUCKETS),
        client=st.sampled_from(CLIENTS),
        steps=st.integers(1, 5),
        wait=st.integers(1, 40),
    )
    def arrive(self, bucket: str, client: str, steps: int, wait: int) -> None:
        if self.queue.is_full:
            return
        self.number += 1
        self.queue.add(self.number, bucket=bucket, steps=steps, client=client, deadline=self.now + wait)
        self.alive[self.number] = (bucket, steps, self.now + wait)
        self.seen[self.number] = []

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive)))
        assert self.queue.cancel(number)
        assert not self.queue.cancel(number)
        del self.alive[number]

    @rule(later=st.integers(0, 15))
    def expire(self, later: int) -> None:
        self.now += later
        late = {number for number, (_, _, deadline) in self.alive.items() if deadline < self.now}
        assert set(self.queue.expire(self.now)) == late
        for number in late:
            del self.alive[number]

    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        work = self.queue.next()
        if work is None:
            assert not self.alive
            return
        edits = work.edits if isinstance(work, Step) else (work.edit,)
        assert len(set(edits)) == len(edits) <= self.queue.batch_max
        for number in edits:
            bucket, steps, _ = self.alive[number]
            self.seen[number].append(type(work))
            expected = [Prepare, *[Step] * steps, Complete]
            assert self.seen[number] == expected[: len(self.seen[number])]
            assert not isinstance(work, Step) or bucket == work.bucket
        failed = data.draw(st.lists(st.sampled_from(edits), max_size=1))
        gone = data.draw(st.lists(st.sampled_from(edits), max_size=1))
        for number in gone:  # a client leaves while the work is done
            self.queue.cancel(number)
        self.queue.done(work, failed=failed)
        for number in {*failed, *gone}:
            del self.alive[number]
        if isinstance(work, Complete) and work.edit in self.alive:
            del self.alive[work.edit]
            self.completed.add(work.edit)

    @invariant()
    def bounds(self) -> None:
        queue = self.queue
        assert queue.waiting <= queue.waiting_max
        assert queue.running <= queue.running_max
        assert queue.waiting + queue.running == len(self.alive)
        assert queue.steps_left == sum(
            steps - self.seen[number].count(Step) for number, (_, steps, _) in self.alive.items()
        )

    def teardown(self) -> None:
        """Whoever was not cancelled gets a result."""
        while (work := self.queue.next()) is not None:
            self.queue.done(work)
            if isinstance(work, Complete):
                self.completed.add(work.edit)
        assert set(self.alive) <= self.completed
        assert vars(self.queue)["_last_step"] == vars(self.queue)["_last_turn"] == {}, "something was kept"


class SwappingMachine(Machine):
    swaps = True


TestEager = Machine.TestCase
TestSwapping = SwappingMachine.TestCase
TestEager.settings = TestSwapping.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, derandomize=True, database=None
)


def test_an_edit_joins_at_its_own_first_step_and_leaves_after_its_last_one() -> None:
    queue = scheduler()
    queue.add(1, bucket="A", steps=3)
    assert queue.next() == Prepare(edit=1)
    queue.done(Prepare(edit=1))
    step = queue.next()
    assert step == Step(bucket="A", edits=(1,))
    queue.add(2, bucket="A", steps=3)
    queue.done(step)
    assert work_of(queue) == [
        Prepare(edit=2),
        Step(bucket="A", edits=(1, 2)),
        Step(bucket="A", edits=(1, 2)),
        Complete(edit=1),
        Step(bucket="A", edits=(2,)),
        Complete(edit=2),
    ]


def test_a_cancelled_edit_frees_its_place_at_the_next_step() -> None:
    queue = scheduler(batch_max=2, running_max=2)
    for number in (1, 2, 3):
        queue.add(number, bucket="A", steps=9)
    for _ in range(2):
        work = queue.next()
        assert isinstance(work, Prepare)
        queue.done(work)
    step = queue.next()
    assert step == Step(bucket="A", edits=(1, 2))
    queue.cancel(1)
    queue.done(step)
    assert queue.next() == Prepare(edit=3)
    queue.done(Prepare(edit=3))
    assert queue.next() == Step(bucket="A", edits=(2, 3))


def test_a_client_that_floods_the_queue_delays_nobody_by_more_than_its_running_edits() -> None:
    queue = scheduler(batch_max=2, running_max=2)
    for number in range(50):
        queue.add(number, bucket="A", steps=2, client="flood")
    queue.add(99, bucket="A", steps=2, client="one")
    order = [work.edit for work in work_of(queue) if isinstance(work, Complete)]
    assert order.index(99) <= 2


def test_clients_take_turns() -> None:
    queue = scheduler(batch_max=1, running_max=1)
    for number, client in enumerate("aaabbbccc"):
        queue.add(number, bucket="A", steps=1, client=client)
    order = [work.edit for work in work_of(queue) if isinstance(work, Prepare)]
    assert ["aaabbbccc"[number] for number in order] == list("abcabcabc")
    assert all(
        [n for n in order if "aaabbbccc"[n] == c] == sorted(n for n in order if "aaabbbccc"[n] == c) for c in "abc"
    )


def test_buckets_take_turns() -> None:
    queue = scheduler()
    queue.add(1, bucket="A", steps=4)
    queue.add(2, bucket="B", steps=2)
    steps = [work.bucket for work in work_of(queue) if isinstance(work, Step)]
    assert steps == ["A", "B", "A", "B", "A", "A"]


def test_a_bucket_without_a_place_holds_up_no_other() -> None:
    queue = scheduler(batch_max=1, running_max=3)
    queue.add(1, bucket="A", steps=5)
    queue.add(2, bucket="A", steps=5)
    queue.add(3, bucket="B", steps=1)
    order = [work.edit for work in work_of(queue) if isinstance(work, Complete)]
    assert order == [3, 1, 2]


@pytest.mark.parametrize(("swaps", "changes"), [(True, 3), (False, 15)])
def test_engines_that_do_not_fit_together_are_swapped_once_for_all_edits(swaps: bool, changes: int) -> None:
    queue = scheduler(swaps=swaps)
    for number, steps in enumerate((1, 2, 3, 4, 5, 6, 7), start=1):
        queue.add(number, bucket=number % 2, steps=steps)
    kinds = [kind for kind, _ in groupby(type(work) for work in work_of(queue))]
    assert len(kinds) == changes


def test_edits_that_arrive_while_steps_are_taken_wait_for_the_next_swap() -> None:
    queue = scheduler(swaps=True)
    queue.add(1, bucket="A", steps=2)
    work = queue.next()
    assert work is not None
    queue.done(work)
    step = queue.next()
    assert isinstance(step, Step)
    queue.add(2, bucket="A", steps=1)
    queue.done(step)
    assert [type(work) for work in work_of(queue)] == [Step, Complete, Prepare, Step, Complete]
