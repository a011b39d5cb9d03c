"""From steps that are done to what a request is told: events, previews and the picture."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from tinyflux.inference.events import Step
from tinyflux.inference.request_pool import RequestPool
from tinyflux.inference.request_state import RequestState
from tinyflux.inference.streams import Moment, mark, side_thread, take_over
from tinyflux.util.images import png_bytes


class LatentDecoder(Protocol):
    """What the processor needs of a ModelZoo."""

    def decode_latents(self, latents: Tensor, shift: float | None = None) -> Tensor: ...


class OutputProcessor:
    """A thread that decodes latents, with a stream of its own on a GPU.

    An error of one request's decoding is that request's alone.

    Args:
        zoo: the frozen models, loaded.
        pool: who is told which requests wait for a preview, and which have ended.
        device: of the student.
    """

    def __init__(self, zoo: LatentDecoder, pool: RequestPool, device: torch.device):
        self._zoo, self._pool, self._device = zoo, pool, device
        self._thread = side_thread("decoder", device)

    def tell(self, state: RequestState) -> None:
        """Pass on that a step of a request has ended, and what it gave; does not wait."""
        if state.handle.ended:
            return
        path, every = state.path, state.request.preview_every
        event = Step(path.step, path.total, None)
        if not every:
            state.handle.tell(event)
        elif path.step % every or path.step == path.total:
            # By the thread, so that it does not overtake a preview.
            self._thread.submit(state.handle.tell, event)
        else:
            self._pool.begin_preview(state)
            self._thread.submit(self._preview, state, event, path.data(), mark(self._device))
        if path.step == path.total:
            state.denoised = True
            self._thread.submit(self._finish, state, path.x, mark(self._device))

    def close(self) -> None:
        """Wait for what is to be decoded, and end the thread."""
        self._thread.shutdown()

    def _preview(self, state: RequestState, event: Step, x: Tensor, made: Moment | None) -> None:
        try:
            if not state.handle.ended:
                preview = png_bytes(self._decode(state, x, made))
                state.handle.tell(dataclasses.replace(event, preview=preview))
        except Exception as error:
            self._pool.fail(state, "a preview was decoded", error)
        self._pool.end_preview(state)

    def _finish(self, state: RequestState, x: Tensor, made: Moment | None) -> None:
        try:
            if not state.handle.ended:
                image = self._decode(state, x, made)
                state.handle.finish(image, png_bytes(image))
        except Exception as error:
            self._pool.fail(state, "it was decoded", error)
        else:
            self._pool.end(state)

    @torch.inference_mode()
    def _decode(self, state: RequestState, x: Tensor, made: Moment | None) -> Tensor:
        """``[3, H, W]`` in [0, 1] on the CPU of latents ``[C, h, w]``, there at ``made``."""
        take_over(x, made)
        shift = state.model.config.latent_shift
        return self._zoo.decode_latents(x[None], shift=shift)[0].float().clamp(0, 1).cpu()
