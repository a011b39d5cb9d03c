"""The random numbers of training, each of which belongs to a sample's position in the run."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    def at(cls, seed: int, positions: Tensor, shape: tuple[int, ...]) -> "Draws":
        """Draws for samples at ``positions``, whose latents have ``shape`` ``(C, H, W)``.

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
        noise = torch.stack([randn_for(shape, seed, "noise", place) for place in places])
        text, teachers, _ = uniform.unbind(-1)
        return cls(normal, noise, text, teachers, dropout)
