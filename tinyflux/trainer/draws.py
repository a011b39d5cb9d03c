"""The random numbers of training, each of which belongs to a sample's position in the run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyflux.data.batches import TrainBatch
from tinyflux.model.time_shift import shift_at
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.schedules import timesteps_from_normal
from tinyflux.util.philox import key_of, normal_at
from tinyflux.util.seeding import generator, randn_for


@dataclass
class Draws:
    """All random numbers of a batch, by position.

    Attributes:
        normal: ``[B]`` standard normal, for the time.
        noise: ``[B, C, H, W]`` standard normal.
        text: ``[B]`` uniform, for the dropout of captions.
        teachers: ``[B]`` uniform, for the dropout of both teachers: they are missing together.
        dropout: ``[B]`` int64 seeds of the model's dropout layers.
    """

    normal: Tensor
    noise: Tensor
    text: Tensor
    teachers: Tensor
    dropout: Tensor

    @classmethod
    def at(
        cls,
        seed: int,
        positions: Tensor,
        shape: tuple[int, ...],
        noise_generator: str = "torch",
        device: torch.device | str = "cpu",
    ) -> "Draws":
        """Draws for samples at ``positions``, whose latents have ``shape`` ``(C, H, W)``.

        All are on the CPU, but for the noise by ``"philox"``, which is made on ``device``.

        A sample's numbers always come in the same order, whatever options are on: the normal, the
        caption's, the teachers', one that was Sol's own and is drawn so that the next stays what
        it was, and the dropout layers' seed.
        """
        places = positions.tolist()
        normal = torch.empty(len(places))
        uniform = torch.empty(len(places), 3)
        dropout = torch.empty(len(places), dtype=torch.int64)
        for row, place in enumerate(places):
            source = generator(seed, "draws", place)
            normal[row] = torch.randn((), generator=source)
            uniform[row] = torch.rand(3, generator=source)
            dropout[row] = torch.randint(2**31, (), generator=source)
        if noise_generator == "philox":
            there = positions.to(device, non_blocking=True)
            noise = normal_at(key_of(seed, "noise"), there, math.prod(shape)).unflatten(1, shape)
        else:
            noise = torch.stack([randn_for(shape, seed, "noise", place) for place in places])
        text, teachers, _ = uniform.unbind(-1)
        return cls(normal, noise, text, teachers, dropout)


@dataclass
class Conditions:
    """How the samples of a micro-batch are trained, by their draws and a run's settings.

    Attributes:
        t: ``[B]`` times.
        noise: ``[B, C, H, W]`` standard normal.
        no_text: ``[B]`` bool, whose captions are dropped.
        keep_lune, keep_sol: ``[B]`` bool, whose forward may see that teacher. As in use, none sees
            one without its caption.
        dropout: ``[B]`` int64 seeds of the model's dropout layers.
        others: ``[B]`` int64, for each sample another of the batch, as of :func:`others_of`; None
            where nothing asks for one.
    """

    t: Tensor
    noise: Tensor
    no_text: Tensor
    keep_lune: Tensor
    keep_sol: Tensor
    dropout: Tensor
    others: Tensor | None = None

    @classmethod
    def of(
        cls, batch: TrainBatch, config: TrainerConfig, device: torch.device | str = "cpu"
    ) -> "Conditions":
        """Those of a batch, the same numbers for every device.

        They are on the CPU, but for noise that ``config`` wants drawn on the run's ``device``.
        """
        shape = tuple(batch.latents.shape[1:])
        draws = Draws.at(config.seed, batch.positions, shape, config.noise_generator, device)
        t = timesteps_from_normal(
            draws.normal,
            # Pictures of a batch have one size.
            shift=shift_at(config.shift, math.prod(batch.grid), config.shift_tokens),
            logit_normal=config.logit_normal_sampling,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        )
        no_text = draws.text < config.text_dropout
        shuffles = any(target.shuffle for target in config.align)
        return cls(
            t,
            draws.noise,
            no_text,
            keep_lune=~no_text & (draws.teachers >= config.lune_dropout),
            keep_sol=~no_text & (draws.teachers >= config.sol_dropout),
            dropout=draws.dropout,
            others=others_of(config.seed, batch.positions) if shuffles else None,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        """The same with every tensor changed so, as by a copy to a device."""
        changed: dict[str, Any] = {
            name: None if tensor is None else change(tensor) for name, tensor in vars(self).items()
        }
        return Conditions(**changed)


def others_of(seed: int, positions: Tensor) -> Tensor:
    """For each of the samples at ``positions`` ``[B]`` the index of another one, drawn by them.

    In the order of the samples' draws each has the next one, and the last the first: the order of
    the batch does not matter, and none has itself unless it is alone.
    """
    places = positions.tolist()
    draws = torch.stack([torch.rand((), generator=generator(seed, "other", p)) for p in places])
    order = draws.argsort(stable=True)
    others = torch.empty_like(order)
    others[order] = order.roll(-1)
    return others
