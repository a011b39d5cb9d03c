"""From a request to what the model reads: prompts encoded, noise drawn."""

from typing import Protocol

import torch

from tinyflux.inference.prompt_cache import PromptCache, PromptEncoders
from tinyflux.inference.request_pool import RequestPool
from tinyflux.inference.request_state import RequestState
from tinyflux.inference.sampler import initial_noise, sample_times
from tinyflux.inference.solvers import Trajectory
from tinyflux.inference.streams import hand_over, side_thread


class InputModels(PromptEncoders, Protocol):
    """What the processor needs of a ModelZoo."""

    @property
    def downscale(self) -> int:
        """Pixels of a latent's side."""
        ...


class InputProcessor:
    """A thread that prepares requests, with a stream of its own on a GPU.

    An error of one request's preparation is that request's alone.

    Args:
        zoo: the frozen models, loaded.
        pool: where requests go that are ready.
        cached_prompts: prompts that are kept encoded.
        device, dtype: of the student.
    """

    def __init__(
        self,
        zoo: InputModels,
        pool: RequestPool,
        cached_prompts: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._zoo, self._pool, self._device = zoo, pool, device
        self._prompts = PromptCache(zoo, cached_prompts, device, dtype)
        self._thread = side_thread("encoder", device)

    @property
    def cached_prompts(self) -> int:
        """Prompts that are kept encoded now."""
        return len(self._prompts)

    def submit(self, state: RequestState) -> None:
        """Have a request prepared; does not wait for it."""
        self._thread.submit(self._process, state)

    def close(self) -> None:
        """Wait for what was submitted, and end the thread."""
        self._thread.shutdown()

    @torch.inference_mode()
    def _process(self, state: RequestState) -> None:
        if state.handle.ended:
            return
        request, config, step = state.request, state.model.config, self._zoo.downscale
        height, width = request.height // step, request.width // step
        try:
            state.cond, state.handle.cut = self._prompts(request.prompt)
            if request.guidance_scale != 1.0:
                state.uncond, state.handle.negative_cut = self._prompts(request.negative_prompt)
            x = initial_noise([request.seed], config.in_channels, height, width)[0]
            times = sample_times(config, request.num_steps, height, width)
            state.path = Trajectory(x.to(self._device), times, request.solver)
            hand_over(state.tensors(), self._device)
        except Exception as error:
            self._pool.fail(state, "its prompt was encoded", error)
        else:
            self._pool.make_ready(state)
