"""What one asks of an engine, and what comes back."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from tinyflux.inference.events import Drawn, Step
from tinyflux.model.text import READ_WHOLE, CutTokens

# Events kept for a reader that lags behind: beyond that the oldest go.
MAX_UNREAD = 64


@dataclass(frozen=True)
class SampleRequest:
    """One picture to draw; sizes in pixels, a seed already chosen.

    ``preview_every`` asks for a preview each so many steps; 0 is none. ``adapter`` is the name of
    one that the engine has; None draws with the student alone.
    """

    prompt: str
    negative_prompt: str
    num_steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int
    solver: str = "euler"
    preview_every: int = 0
    adapter: str | None = None


class RequestHandle:
    """A request that an engine has accepted. Thread-safe; one reader of :meth:`events`.

    Attributes:
        cut, negative_cut: how much of the prompt and of the negative prompt the text encoders do
            not read; known before the first event.
    """

    def __init__(self, on_cancel: Callable[[], None]):
        self.cut: CutTokens = READ_WHOLE
        self.negative_cut: CutTokens = READ_WHOLE
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._unread: deque[Step | Drawn] = deque(maxlen=MAX_UNREAD)
        self._image: Tensor | None = None
        self._png: bytes | None = None
        self._error: BaseException | None = None
        self._wake: Callable[[], object] | None = None

    @property
    def ended(self) -> bool:
        """Whether the picture is there, or will not come."""
        return self._image is not None or self._error is not None

    def cancel(self) -> None:
        """Give the picture up: its place is free at the next step. Too late is no error."""
        self._on_cancel()

    async def events(self) -> AsyncIterator[Step | Drawn]:
        """What happens, in order, up to :class:`Drawn`.

        Raises:
            TinyFluxError: the request's error, in place of ``Drawn``.
        """
        loop, wake = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: loop.call_soon_threadsafe(wake.set)
        try:
            while True:
                wake.clear()
                with self._changed:
                    event = self._unread.popleft() if self._unread else None
                    error = self._error
                if event is not None:
                    yield event
                    if isinstance(event, Drawn):
                        return
                elif error is not None:
                    raise error
                else:
                    await wake.wait()
        finally:
            with self._changed:
                self._wake = None

    def result(self, timeout: float | None = None) -> Tensor:
        """Wait for the picture, ``[3, H, W]`` in [0, 1] on the CPU.

        Raises:
            TimeoutError: it was not there after ``timeout`` seconds; it still comes.
            TinyFluxError: the request's error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self.ended:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"the picture was not there after {timeout} seconds")
                self._changed.wait(left)
            if self._image is None:
                assert self._error is not None
                raise self._error
            return self._image

    @property
    def png(self) -> bytes:
        """The picture as PNG, once :meth:`result` has given it."""
        assert self._png is not None
        return self._png

    # For the engine

    def tell(self, event: Step) -> bool:
        """Pass a step on; False if the request had ended before."""
        with self._changed:
            if self.ended:
                return False
            self._unread.append(event)
            self._notify()
            return True

    def finish(self, image: Tensor, png: bytes) -> bool:
        """End the request with its picture, twice; False if it had ended before."""
        with self._changed:
            if self.ended:
                return False
            self._image, self._png = image, png
            self._on_cancel = _nothing
            self._unread.append(Drawn(png, self.cut, self.negative_cut))
            self._notify()
            return True

    def fail(self, error: BaseException) -> bool:
        """End the request with ``error``; False if it had ended before."""
        with self._changed:
            if self.ended:
                return False
            self._error = error
            self._on_cancel = _nothing
            self._notify()
            return True

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._wake is not None:
            with suppress(RuntimeError):  # the reader's event loop is closed
                self._wake()


def _nothing() -> None:
    """What cancelling does at the end; a handle that is kept then keeps no model alive."""
