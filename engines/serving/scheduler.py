"""Which edits run next, and which of them together: a queue in front of batches that go on step by step.

An edit waits, is prepared (its images and prompts are encoded), takes its steps, and is completed (its latents are
decoded). Edits of one bucket, whose tensors have the same shapes, take a step together whichever step each is at: an
edit joins a batch at its own first step and leaves it after its own last one. A batch is as large as the bucket has
edits, so that an edit that is cancelled frees its place at the next step.

The scheduler holds numbers, no tensors. It reads no clock and starts no thread: ``qie.engines.serving.service`` asks
for the next piece of work, does it, and reports it done.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

__all__ = ["Complete", "Prepare", "Scheduler", "Step", "Work"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare:
    """Encode the images and prompts of an edit.

    Attributes:
        edit: its number.
    """

    edit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Take one step of every edit of a batch.

    Attributes:
        bucket: of all of them.
        edits: their numbers, in the order in which they were prepared; the same tuple as long as none joins or leaves.
    """

    bucket: Hashable
    edits: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Complete:
    """Decode the latents of an edit that has taken its last step.

    Attributes:
        edit: its number.
    """

    edit: int


Work = Prepare | Step | Complete

_EAGER: tuple[type[Work], ...] = (Complete, Prepare, Step)
"""What comes first where any engine may run at any time: what ends, then what makes a batch larger."""

_CYCLE: tuple[type[Work], ...] = (Prepare, Step, Complete)
"""The order where all work of one kind is done before another engine is loaded."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Edit:
    bucket: Hashable
    client: Hashable
    steps_left: int
    deadline: float | None
    prepared: bool = False


class Scheduler:
    """The edits that wait and that run.

    The order is fair between clients: of those that wait, the client with the fewest edits running comes first, then
    the one that was served longest ago; the edits of one client run in the order in which they came. Buckets take their
    steps in turn. What ends comes before what goes on: an edit whose last step is done is completed at once.

    Attributes:
        batch_max: edits that take a step together.
        running_max: edits that are prepared and not completed, whose tensors are in memory.
        waiting_max: edits that wait.
    """

    def __init__(self, *, batch_max: int, running_max: int, waiting_max: int, swaps: bool = False) -> None:
        """Start empty.

        Args:
            batch_max: see the class, at least 1.
            running_max: see the class, at least 1.
            waiting_max: see the class, at least 1.
            swaps: whether an engine is loaded again whenever the kind of work changes, because not all of them fit into
                the memory of the GPU. As many edits as may run are then prepared before the first step, and all of
                their steps are taken before one is completed.
        """
        assert min(batch_max, running_max, waiting_max) >= 1
        self.batch_max, self.running_max, self.waiting_max = batch_max, running_max, waiting_max
        self._swaps = swaps
        self._kind: type[Work] = Prepare
        self._waiting: dict[int, _Edit] = {}
        self._running: dict[int, _Edit] = {}
        self._at_work: frozenset[int] = frozenset()
        self._turns: Iterator[int] = count(1)
        self._last_turn: dict[Hashable, int] = {}
        self._last_step: dict[Hashable, int] = {}

    @property
    def waiting(self) -> int:
        """Edits that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Edits that are prepared, or being prepared, and not completed."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether no other edit may wait."""
        return len(self._waiting) >= self.waiting_max

    @property
    def steps_left(self) -> int:
        """Steps of all edits that wait or run."""
        return sum(edit.steps_left for edit in (*self._waiting.values(), *self._running.values()))

    def add(
        self, number: int, *, bucket: Hashable, steps: int, client: Hashable = None, deadline: float | None = None
    ) -> None:
        """Let an edit wait.

        Args:
            number: of the edit; no other that waits or runs has it.
            bucket: what edits of one batch have in common.
            steps: of its schedule, at least 1.
            client: who asks for it.
            deadline: time behind which nobody waits for it; None for no such time.
        """
        assert number not in self._waiting | self._running, number
        assert steps >= 1, steps
        assert not self.is_full, "the queue is full"
        self._waiting[number] = _Edit(bucket=bucket, client=client, steps_left=steps, deadline=deadline)

    def cancel(self, number: int) -> bool:
        """Forget an edit, also while a piece of work with it is done.

        Returns:
            Whether it waited or ran.
        """
        edit = self._waiting.pop(number, None) or self._running.pop(number, None)
        if edit is not None:
            self._forget(edit)
        return edit is not None

    def expire(self, now: float) -> tuple[int, ...]:
        """Forget the edits whose deadline is before ``now``: their numbers."""
        late = [
            number
            for number, edit in (*self._waiting.items(), *self._running.items())
            if edit.deadline is not None and edit.deadline < now
        ]
        for number in late:
            self.cancel(number)
        return tuple(late)

    def next(self) -> Work | None:
        """The next piece of work, to be done before another one is asked for; None where nothing waits or runs."""
        assert not self._at_work, "a piece of work was not reported done"
        work = self._choose()
        if isinstance(work, Prepare):
            edit = self._running[work.edit] = self._waiting.pop(work.edit)
            self._last_turn[edit.client] = next(self._turns)
        if work is not None:
            self._at_work = frozenset(work.edits if isinstance(work, Step) else (work.edit,))
        return work

    def done(self, work: Work, *, failed: Iterable[int] = ()) -> None:
        """Report that ``work``, the last that ``next`` gave, is done; ``failed`` edits of it go no further."""
        assert self._at_work, "no piece of work was given"
        self._at_work, turn = frozenset(), next(self._turns)
        for number in failed:
            self.cancel(number)
        if isinstance(work, Step):
            for number in work.edits:
                if number in self._running:
                    self._running[number].steps_left -= 1
                    self._last_step[work.bucket] = turn
        elif work.edit in self._running:
            if isinstance(work, Complete):
                self.cancel(work.edit)
            else:
                self._running[work.edit].prepared = True

    def _choose(self) -> Work | None:
        order = _EAGER
        if self._swaps:
            here = _CYCLE.index(self._kind)
            order = _CYCLE[here:] + _CYCLE[:here]
        for kind in order:
            work = self._next_of(kind)
            if work is not None:
                self._kind = kind
                return work
        return None

    def _next_of(self, kind: type[Work]) -> Work | None:
        if kind is Prepare:
            return self._next_preparation()
        return self._next_step() if kind is Step else self._next_completion()

    def _next_completion(self) -> Complete | None:
        ended = (number for number, edit in self._running.items() if edit.steps_left == 0)
        return next((Complete(edit=number) for number in ended), None)

    def _next_preparation(self) -> Prepare | None:
        """Of an edit whose bucket has a place, in the order that is fair to clients."""
        if len(self._running) >= self.running_max:
            return None
        taken = Counter(edit.bucket for edit in self._running.values())
        of_client = Counter(edit.client for edit in self._running.values())
        free = [number for number, edit in self._waiting.items() if taken[edit.bucket] < self.batch_max]

        def turn(number: int) -> tuple[int, int]:
            client = self._waiting[number].client
            return of_client[client], self._last_turn.get(client, 0)

        return Prepare(edit=min(free, key=turn)) if free else None  # of equals the one that came first

    def _next_step(self) -> Step | None:
        """The step of the bucket that took its last one longest ago."""
        ready = {n: edit for n, edit in self._running.items() if edit.prepared and edit.steps_left > 0}
        if not ready:
            return None
        bucket = min((edit.bucket for edit in ready.values()), key=lambda bucket: self._last_step.get(bucket, 0))
        return Step(bucket=bucket, edits=tuple(n for n, edit in ready.items() if edit.bucket == bucket))

    def _forget(self, gone: _Edit) -> None:
        """Drop what is known of a client or a bucket behind its last edit."""
        left = (*self._waiting.values(), *self._running.values())
        if all(edit.bucket != gone.bucket for edit in left):
            self._last_step.pop(gone.bucket, None)
        if all(edit.client != gone.client for edit in left):
            self._last_turn.pop(gone.client, None)
