"""The engine's loop: who is next, one forward, what came of it, and again."""

import threading
import time

import torch

from tinyflux.errors import ServingError
from tinyflux.inference.model_runner import execute_model
from tinyflux.inference.output_processor import OutputProcessor
from tinyflux.inference.request_pool import RequestPool
from tinyflux.inference.request_state import RequestState
from tinyflux.inference.streams import Moment, mark


class EngineCore:
    """A thread that runs forwards for as long as the pool has requests or may get some.

    A forward that finds no memory is its batch's error alone. Any other ends the loop, and with it
    all requests of the pool.
    """

    def __init__(self, pool: RequestPool, outputs: OutputProcessor, device: torch.device):
        self._pool, self._outputs, self._device = pool, outputs, device
        self._thread = threading.Thread(target=self._run, name="denoiser", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the loop's end, which comes once the pool is closed and empty."""
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
        except BaseException as error:
            broken = ServingError(f"the engine's loop broke: {error!r:.200}")
            broken.__cause__ = error
            self._pool.break_down(broken)

    def _loop(self) -> None:
        last: Moment | None = None
        while batch := self._pool.next_batch():
            started = time.monotonic()
            for state in self._execute(batch):
                self._outputs.tell(state)
            # One step ahead of the GPU: it never idles, and who joins waits for little.
            if last is not None:
                last.synchronize()
            last = mark(self._device)
            self._pool.account(batch, time.monotonic() - started)

    def _execute(self, batch: list[RequestState]) -> list[RequestState]:
        try:
            return execute_model(batch)
        except torch.OutOfMemoryError as error:
            for state in batch:
                self._pool.fail(state, "it was denoised", error)
            return []
