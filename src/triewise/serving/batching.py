"""One thread that runs the model: requests wait in a queue, and those of one kind are decoded together.

Where the search allows it users join the running one and leave it when they are done; else batches follow each other.
Whoever asks gets a future. A request that is given up leaves the queue and the search.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

Counts = dict[str, int]
KINDS = (
    8  # searches that run side by side, each with memory of its own; a kind is a catalogue, a search and a k
)


class Session(Protocol):
    """Users who are decoded together, and come and go."""

    @property
    def inside(self) -> int:
        """Users who are in now."""

    def join(self, row: Any) -> int | None:
        """A number for a user, till he is done; None where he has to wait."""

    def step(self) -> Mapping[int, Any]:
        """One round: the results, or errors, of those who are done with it."""

    def leave(self, number: int) -> None:
        """Forget a user."""

    def counts(self) -> Counts:
        """Work so far, and the ``users`` who had a part in it."""


class Work(Protocol):
    """What is done with rows; equal ones (``==``, hashable) are done together."""

    @property
    def joins(self) -> bool:
        """Whether users join a search that runs; else batches are run whole."""

    def open(self) -> Session | None:
        """A search that users join, where they do."""

    def run(self, rows: Sequence[Any]) -> tuple[Sequence[Any], Counts]:
        """A result for each row, and the work done for all of them."""


class FullError(Exception):
    """The queue has no place."""


class ClosedError(Exception):
    """The thread takes nothing more."""


@dataclass(frozen=True)
class Done:
    """What a job comes to.

    Attributes:
        results: One for each of its rows.
        counters: Work of what it had a part in, and the ``users`` that shared it.
        waited: Seconds in the queue.
    """

    results: Sequence[Any]
    counters: Counts
    waited: float


@dataclass(eq=False)
class Job:
    """Some rows of one request.

    Attributes:
        work: What is done with them.
        rows: One for each user.
        until: When nobody waits for it any more, of `time.monotonic`.
        future: Gets a `Done`, or the error.
    """

    work: Work
    rows: Sequence[Any]
    until: float
    future: Future[Done] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    results: dict[int, Any] = field(default_factory=dict)
    joined: int = 0
    before: Counts = field(default_factory=dict)

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it."""
        return self.future.cancelled() or time.monotonic() > self.until


class Batcher:
    """The queue and its thread.

    Args:
        max_batch: Users that are done together.
        wait: Seconds that the first of a batch waits for others.
        queue: Users that may wait.
        seen: Called after each batch with the number of its users, for metrics.
    """

    def __init__(
        self, max_batch: int, wait: float, queue: int, seen: Callable[[int], object] = lambda n: None
    ) -> None:
        self.max_batch, self.wait, self.places, self.seen = max_batch, wait, queue, seen
        self._queue: deque[Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        # of each kind of work that is being done: the search, and whose row a number is
        self._sessions: dict[Work, tuple[Session, dict[int, tuple[Job, int]]]] = {}
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Users in the queue."""
        with self._change:
            return sum(len(job.rows) - job.joined for job in self._queue)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take nothing more, do what waits, end the thread."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, job: Job) -> Future[Done]:
        """Put a job in the queue.

        Raises:
            FullError: More users would wait than may. One request alone always has a place.
            ClosedError: After `close`.
        """
        with self._change:
            if self._closed:
                raise ClosedError
            self._drop()
            if self._queue and self.waiting + len(job.rows) > self.places:
                raise FullError
            self._queue.append(job)
            self._change.notify_all()
        return job.future

    def _drop(self) -> None:
        """Forget who has given up."""
        for job in [job for job in self._queue if job.given_up]:
            self._queue.remove(job)
            job.future.cancel()

    def _serve(self) -> None:
        while self._wait():
            for batch in self._take():
                self._run(batch)
            for work in list(self._sessions):
                self._step(work)

    def _wait(self) -> bool:
        """Till there is something to do, and a batch that is run whole has waited for others; False: never again."""
        with self._change:
            while not self._queue and not self._sessions:
                if self._closed:
                    return False
                self._change.wait()
            if not self._sessions and not self._queue[0].work.joins:
                left = self._queue[0].since + self.wait - time.monotonic()
                self._change.wait_for(lambda: self.waiting >= self.max_batch or self._closed, left)
            return True

    def _take(self) -> list[list[Job]]:
        """Let users join, in their order; and at most one batch that is run whole, of the first who needs one."""
        batch: list[Job] = []
        full: set[Work] = set()  # nobody overtakes those who wait for a place of the same kind
        with self._change:
            self._drop()
            queue = list(self._queue)
        for job in queue:
            if job.work in full or (
                batch and job.work == batch[0].work and self._size(batch, job) > self.max_batch
            ):
                continue
            if job.work.joins and job.work not in self._sessions and len(self._sessions) >= KINDS:
                break  # nobody overtakes who waits for a search to end: those that run get no users more
            done = True
            try:
                session = self._session(job)
                if session is not None:
                    done = self._join(job, session)
                    full |= set() if done else {job.work}
                else:
                    done = not batch or job.work == batch[0].work
                    batch += [job] * done
            except Exception as error:
                self._fail(job, error)
            if done:
                with self._change, contextlib.suppress(ValueError):  # it may have given up meanwhile
                    self._queue.remove(job)
        return [batch] if batch else []

    def _size(self, batch: list[Job], job: Job) -> int:
        return sum(len(other.rows) for other in batch) + len(job.rows)

    def _session(self, job: Job) -> Session | None:
        """The search that a job joins."""
        if job.work not in self._sessions:
            opened = job.work.open()
            if opened is None:
                return None
            self._sessions[job.work] = opened, {}
        return self._sessions[job.work][0]

    def _join(self, job: Job, session: Session) -> bool:
        """Let the rows of a job in; whether none is left outside."""
        if not job.begun:
            if not job.future.set_running_or_notify_cancel():
                return True
            job.begun = time.monotonic()
            job.before = session.counts() | {"users": session.counts()["users"] - session.inside}
        while job.joined < len(job.rows):
            number = session.join(job.rows[job.joined])
            if number is None:
                return False
            self._sessions[job.work][1][number] = job, job.joined
            job.joined += 1
        return True

    def _step(self, work: Work) -> None:
        """One round of a search: who has given up leaves, who is done gets an answer."""
        session, inside = self._sessions[work]
        try:
            for number in [
                number for number, (job, _) in inside.items() if job.given_up or job.future.done()
            ]:
                session.leave(number)
                del inside[number]
            if inside:
                self.seen(len(inside))
                for number, result in session.step().items():
                    job, place = inside.pop(number)
                    if isinstance(result, Exception):
                        self._fail(job, result)
                    job.results[place] = result
                    if not job.future.done() and len(job.results) == len(job.rows):
                        self._finish(job, session.counts())
        except Exception as error:
            for job, _ in inside.values():
                self._fail(job, error)
            inside.clear()
        if not inside:
            del self._sessions[work]

    def _finish(self, job: Job, counts: Counts) -> None:
        """Give a job its results, with the work that was done since it began."""
        since = {name: n if name.endswith("_peak") else n - job.before[name] for name, n in counts.items()}
        results = [job.results[place] for place in range(len(job.rows))]
        job.future.set_result(Done(results, since, job.begun - job.since))

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)

    def _run(self, batch: list[Job]) -> None:
        begun = time.monotonic()
        batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
        rows = [row for job in batch for row in job.rows]
        if not rows:
            return
        try:
            results, counters = batch[0].work.run(rows)
        except Exception as error:
            self._failed(batch, error)
            return
        self.seen(len(rows))
        start = 0
        for job in batch:
            own = results[start : start + len(job.rows)]
            start += len(job.rows)
            job.future.set_result(Done(own, counters | {"users": len(rows)}, begun - job.since))

    def _failed(self, batch: list[Job], error: Exception) -> None:
        """One request's mistake is nobody else's: of several each is run alone."""
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for job in batch:
            try:
                results, counters = job.work.run(job.rows)
                job.future.set_result(Done(results, counters | {"users": len(job.rows)}, 0.0))
            except Exception as own:
                job.future.set_exception(own)
