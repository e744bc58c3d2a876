"""Continuous batching: decodes the requests of many clients together, in a thread.

A job is a text to complete. A job waits in a bounded queue, gets a lane, and reports the tokens of each step. A job
whose client has disconnected is dropped before the next step. Jobs of the same strategy share steps, whatever their
settings.
"""

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from armd_scale.decoding.lanes import STRATEGIES, Lanes
from armd_scale.inference import ARMD, Frontier, Task
from armd_scale.serving.logprobs import Scored, score

STOPPING = "the server is shutting down"


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server accepts no more jobs."""


class Event(NamedTuple):
    """The result of a step for a job."""

    written: list[tuple[int, int]]
    """Positions (from 1) and tokens that the step wrote, in generation order."""
    fresh: list[int]
    """Tokens that now follow the complete beginning of the text, by position."""
    done: bool
    """Whether the text is complete."""
    error: str = ""
    """Why the job failed."""
    scores: dict[int, Scored] | None = None
    """The scores of the positions (from 1) of the text, if ``Scheduler.score`` has asked for them."""


class Job:
    """A text to complete. The asyncio task that submitted the job reads ``events``."""

    def __init__(self, task: Task, eos_id: int, loop: asyncio.AbstractEventLoop) -> None:
        self.task = task
        self.frontier = Frontier(task, eos_id)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.cancelled = False
        self.top = 0
        """Number of the likeliest tokens in the scores."""
        self.submitted = time.perf_counter()
        self._loop = loop

    def put(self, event: Event) -> None:
        """Report an event from the thread of the scheduler."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Scheduler:
    """Decodes jobs in ``lanes`` lanes for each strategy.

    ``queue``: largest number of waiting jobs; ``step_tokens``: largest number of tokens that a step writes in a lane;
    ``on_step``: called after each step with the number of tokens written.
    """

    def __init__(
        self,
        model: ARMD,
        lanes: int,
        queue: int,
        step_tokens: int,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model, self.lanes, self.queue, self.step_tokens = model, lanes, queue, step_tokens
        self._on_step = on_step
        self._waiting: collections.deque[Job] = collections.deque()
        self._scoring: collections.deque[Job] = collections.deque()
        self._running: dict[str, dict[int, Job]] = {strategy: {} for strategy in STRATEGIES}
        self._lanes_of: dict[str, Lanes] = {}
        self._wake = threading.Condition()
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the scheduler accepts jobs."""
        return self._thread.is_alive() and not self._draining

    @property
    def waiting(self) -> int:
        """Number of jobs without a lane."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs in lanes."""
        return sum(map(len, self._running.values()))

    def submit(self, tasks: list[Task]) -> list[Job]:
        """Queue all tasks as jobs, from within an event loop. Raises ``Busy`` or ``Stopping`` and then queues none.

        A text without a free position is done at once.
        """
        loop = asyncio.get_running_loop()
        jobs = [Job(task, self.model.config.eos_id, loop) for task in tasks]
        with self._wake:
            if not self.alive:
                raise Stopping
            if len(self._waiting) + len(self._scoring) + len(jobs) > self.queue:
                raise Busy
            for job in jobs:
                if job.frontier.ended:
                    job.events.put_nowait(Event([], [], True))
                else:
                    self._waiting.append(job)
            self._wake.notify()
        return jobs

    def score(self, job: Job, top: int) -> None:
        """Score the tokens of a job that are known, with the ``top`` likeliest tokens; the last event holds them."""
        with self._wake:
            job.top = top
            self._scoring.append(job)
            if self._stopping:
                job.put(Event([], [], False, STOPPING))
            self._wake.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Remove jobs from the queue, and from their lanes before the next step."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            cancelled = [job for job in self._waiting if job.cancelled]
            for job in cancelled:
                self._waiting.remove(job)
            for job in jobs:
                if job in self._scoring:
                    self._scoring.remove(job)
            self._wake.notify()

    def close(self, grace: float) -> None:
        """Accept no more jobs, and end the thread when all jobs are done. Fails jobs not done in ``grace`` seconds."""
        self._draining = True
        end = time.perf_counter() + grace
        while (self._waiting or self._scoring or self.running) and time.perf_counter() < end:
            time.sleep(0.02)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=60)
        for job in [*self._waiting, *self._scoring, *(job for jobs in self._running.values() for job in jobs.values())]:
            job.put(Event([], [], False, STOPPING))

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._stopping and not self._waiting and not self._scoring and not self.running:
                    self._wake.wait()
                if self._stopping:
                    return
            for strategy in STRATEGIES:
                try:
                    self._admit(strategy)
                    self._step(strategy)
                except Exception as error:  # the jobs of this strategy fail, the server continues
                    self._fail(strategy, self._running[strategy], error)
                    self._lanes_of.pop(strategy, None)  # their state is unknown
            self._score_next()

    def _admit(self, strategy: str) -> None:
        """Free the lanes of cancelled jobs, and fill free lanes from the queue."""
        running = self._running[strategy]
        for lane in [lane for lane, job in running.items() if job.cancelled]:
            self._lanes_of[strategy].release(lane)
            del running[lane]
        free = [lane for lane in range(self.lanes) if lane not in running]
        fresh: dict[int, Job] = {}
        with self._wake:
            for job in [job for job in self._waiting if job.task.decoding.strategy == strategy][: len(free)]:
                self._waiting.remove(job)
                if not job.cancelled:
                    fresh[free.pop(0)] = job
            running.update(fresh)
        if not fresh:
            return
        if strategy not in self._lanes_of:
            slots = self.model.config.length + 1
            self._lanes_of[strategy] = STRATEGIES[strategy](self.model, self.lanes, slots, self.step_tokens)
        try:
            self._lanes_of[strategy].admit({lane: job.task for lane, job in fresh.items()})
        except Exception as error:  # jobs in other lanes continue
            self._fail(strategy, fresh, error)

    def _score_next(self) -> None:
        """Score a text, between the steps of the others."""
        with self._wake:
            job = self._scoring.popleft() if self._scoring else None
        if job is not None:
            try:
                scores = score(self.model, job.task, job.frontier.tokens, job.top)
                job.put(Event([], [], True, scores=scores))
            except Exception as error:  # the job fails, the server continues
                job.put(Event([], [], False, _reason("scoring", error)))

    def _step(self, strategy: str) -> None:
        running = self._running[strategy]
        if not running:
            return
        step = self._lanes_of[strategy].step()
        rows = zip(step.positions.tolist(), step.tokens.tolist(), strict=True)
        self._on_step(sum(self._report(strategy, lane, *row) for lane, row in enumerate(rows) if lane in running))

    def _report(self, strategy: str, lane: int, positions: list[int], tokens: list[int]) -> int:
        """Report written tokens to a job, and free its lane at the end of its text. Returns the number of tokens."""
        job = self._running[strategy][lane]
        written = [(p, t) for p, t in zip(positions, tokens, strict=True) if p]
        fresh = job.frontier.push(positions, tokens)
        done = job.frontier.ended
        if done:
            self._lanes_of[strategy].release(lane)
            del self._running[strategy][lane]
        job.put(Event(written, fresh, done))
        return len(written)

    def _fail(self, strategy: str, jobs: dict[int, Job], error: Exception) -> None:
        """Report an error to jobs, and remove them."""
        for lane, job in list(jobs.items()):
            job.put(Event([], [], False, _reason("decoding", error)))
            del self._running[strategy][lane]


def _reason(what: str, error: Exception) -> str:
    return f"{what} failed: " + " ".join(str(error).split())[:300]
