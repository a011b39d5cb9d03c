"""The requests that an engine has accepted: who waits, who is in the forward, who has ended."""

import threading
from collections.abc import Callable
from typing import TypedDict

from tinyflux.errors import OverloadedError, ServingError, TinyFluxError
from tinyflux.inference.request_state import RequestState
from tinyflux.inference.scheduler import Scheduler

# Previews of one request that may wait for the decoder: beyond that the request waits for them.
MAX_PREVIEWS = 2
# Weight of the newest step in the mean step time.
RECENT = 0.1


class PoolStats(TypedDict):
    """How the requests of an engine are doing.

    Attributes:
        queue_length: requests that are accepted and not in the batch.
        batch_size: requests in the batch.
        steps: forwards done.
        step_seconds: the recent mean of what one took.
    """

    queue_length: int
    batch_size: int
    steps: int
    step_seconds: float


class RequestPool:
    """Accepted requests up to their end, and the order of their forwards. Thread-safe.

    Args:
        max_batch: requests of a forward.
        max_queue: how many more may wait.
    """

    def __init__(self, max_batch: int, max_queue: int):
        self._room = max_batch + max_queue
        self._changed = threading.Condition()  # guards all below
        self._scheduler: Scheduler[RequestState] = Scheduler(max_batch)
        self._open: dict[RequestState, None] = {}  # accepted and not ended, in order of arrival
        self._batch: list[RequestState] = []
        self._closed = False
        self._broken: ServingError | None = None
        self._steps, self._step_seconds, self._evaluation_seconds = 0, 0.0, 0.0

    # Into the pool

    def admit(self, state: RequestState, begin: Callable[[RequestState], object]) -> None:
        """Accept a request, and ``begin`` it before the pool can be closed.

        Raises:
            OverloadedError: the pool is full.
            ServingError: it is closed or broken.
        """
        with self._changed:
            self.check_open()
            if len(self._open) >= self._room:
                seconds = self._backlog_seconds() / 2
                raise OverloadedError(
                    f"{len(self._open)} pictures are being drawn or wait, which is all there is "
                    f"room for: try again in {seconds:.0f} seconds",
                    seconds,
                )
            self._open[state] = None
            begin(state)

    def check_open(self) -> None:
        """Raise a :class:`ServingError` if the pool is broken or closed."""
        if self._broken is not None:
            raise self._broken
        if self._closed:
            raise ServingError("the engine is closed and takes no more requests")

    def make_ready(self, state: RequestState) -> None:
        """Let a request whose prompts are encoded have its forwards."""
        with self._changed:
            if not state.handle.ended:
                self._scheduler.add(state, state.batch_key, state.evaluations)
                self._changed.notify_all()

    # Out of it

    def end(self, state: RequestState) -> None:
        """Forget a request whose handle has ended."""
        with self._changed:
            self._open.pop(state, None)
            if state not in self._batch:  # else the loop removes it after the step
                self._scheduler.remove(state)
            self._changed.notify_all()

    def cancel(self, state: RequestState) -> None:
        """End a request that nobody wants any more."""
        if state.handle.fail(ServingError("the request was cancelled")):
            self.end(state)

    def fail(self, state: RequestState, doing: str, error: Exception) -> None:
        """End a request with an error of its own: a user's mistake as it is, others wrapped."""
        told = error
        if not isinstance(error, TinyFluxError):
            told = ServingError(f"the picture failed while {doing}: {error!r:.200}")
            told.__cause__ = error
        state.handle.fail(told)
        self.end(state)

    def close(self, drain: bool) -> None:
        """Accept no more requests, and finish the accepted ones, or fail them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if drain:
                self._changed.wait_for(lambda: not self._open)
        self._fail_all(ServingError("the engine was closed before the picture was drawn"))

    def break_down(self, error: ServingError) -> None:
        """Fail all requests, those that come from now on as well."""
        with self._changed:
            self._broken = error
            self._batch = []
        self._fail_all(error)

    def _fail_all(self, error: ServingError) -> None:
        with self._changed:
            states = list(self._open)
        for state in states:
            state.handle.fail(error)
            self.end(state)

    # Forwards

    def next_batch(self) -> list[RequestState]:
        """Whose turn it is; waits for requests, and is empty when there will be none."""
        with self._changed:
            while not (batch := self._scheduler.next()):
                if self._closed and not self._open:
                    return []
                self._changed.wait()
            self._batch = batch
            return batch

    def account(self, batch: list[RequestState], seconds: float) -> None:
        """Note what a forward took, and let those go that want no other."""
        with self._changed:
            self._steps += 1
            weight = RECENT if self._steps > 1 else 1.0
            self._step_seconds += weight * (seconds - self._step_seconds)
            each = seconds / len(batch)
            self._evaluation_seconds += weight * (each - self._evaluation_seconds)
            self._scheduler.charge(batch, seconds)
            self._batch = []
            for state in batch:
                state.evaluations = state.path.evaluations
                if state.handle.ended:
                    self._scheduler.remove(state)

    def begin_preview(self, state: RequestState) -> None:
        """Note a preview that waits for the decoder; with too many of them its request waits."""
        with self._changed:
            state.previews += 1
            if state.previews >= MAX_PREVIEWS:
                self._scheduler.hold(state, True)

    def end_preview(self, state: RequestState) -> None:
        """Note that a preview is decoded; its request goes on."""
        with self._changed:
            state.previews -= 1
            self._scheduler.hold(state, False)
            self._changed.notify_all()

    def stats(self) -> PoolStats:
        """How the requests are doing now."""
        with self._changed:
            wanted = sum(not state.denoised for state in self._open)
            return {
                "queue_length": max(wanted - len(self._batch), 0),
                "batch_size": len(self._batch),
                "steps": self._steps,
                "step_seconds": self._step_seconds,
            }

    def _backlog_seconds(self) -> float:
        """About how long it takes to draw what is accepted now."""
        wanted = sum(state.evaluations for state in self._open if not state.denoised)
        return max(1.0, wanted * self._evaluation_seconds)
