"""Projectors of a student's image tokens, which are trained beside it and no part of it."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tinyflux.errors import ConfigError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep, tokens_after
from tinyflux.model.packing import pack_latents, unpack_latents
from tinyflux.model.weights import check_tensors
from tinyflux.trainer.align_config import AlignConfig, check_blocks
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util.config import to_dict
from tinyflux.util.seeding import generator

T = TypeVar("T")

# Before the names of all their tensors, which no tensor of a student begins with.
PREFIX = "projectors."
# What fixes a projector's tensors and what they mean; the rest of a target may change.
FIXED = ("group", "block", "projector")


class TokenMLP(nn.Module):
    """Three linear layers with SiLU between, for each token alone (REPA, arXiv:2410.06940)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, channels),
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B, N, width]`` to ``[B, N, channels]``."""
        projected: Tensor = self.layers(tokens)
        return projected


class TokenConv(nn.Module):
    """A convolution of 3 x 3 tokens (iREPA, arXiv:2512.10794)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B, N, width]`` of tokens on ``grid`` to ``[B, N, channels]``."""
        return pack_latents(self.conv(unpack_latents(tokens, *grid)))


class Unprojected(nn.Module):
    """The tokens as they are."""

    def __init__(self, width: int, channels: int):
        super().__init__()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B, N, width]``, unchanged."""
        return tokens


KINDS: dict[str, type[TokenMLP] | type[TokenConv] | type[Unprojected]] = {
    "mlp": TokenMLP,
    "conv": TokenConv,
    "none": Unprojected,
}


def projector_of(target: AlignConfig, model: TinyFluxConfig) -> nn.Module:
    """A projector of the tokens of a student of ``model``, with torch's own first weights."""
    return KINDS[target.projector](model.hidden_size, target_channels(target.group, model))


def target_channels(group: str, model: TinyFluxConfig) -> int:
    """Channels of what tokens are held against, at each place."""
    return {"latents": model.token_channels}[group]


class AlignedStudent(nn.Module):
    """A student and its projectors as one module, which an engine trains.

    Args:
        student: as ``module``, so that its tensors keep their plain names in this one.
        seed: with a target's name it draws its projector's first weights, so that these depend on
            no other target and change no other draw.

    Raises:
        ConfigError: a target is after a block that the student has not.
    """

    def __init__(self, student: TinyFluxDeep, targets: Collection[AlignConfig], seed: int):
        super().__init__()
        check_blocks(list(targets), student.config.num_blocks)
        self.module = student
        with torch.random.fork_rng(devices=[]):
            self.projectors = nn.ModuleDict(
                {target.name: projector_of(target, student.config) for target in targets}
            )
        self._blocks = {target.name: target.block for target in targets}
        self._draw(seed)
        self.projectors.to(next(student.parameters()).device)

    def _draw(self, seed: int) -> None:
        """Draw weights as the student's own are drawn: Xavier's, and biases of 0."""
        for name, parameter in self.projectors.named_parameters():
            if parameter.ndim < 2:
                nn.init.zeros_(parameter)
            else:
                source = generator(seed, "projectors", name)
                nn.init.xavier_uniform_(parameter, generator=source)

    def forward(
        self, *args: Any, grid: tuple[int, int], aligned: Collection[str] = (), **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's forward with ``return_expert_pred``, and projected tokens in its dict.

        Args:
            grid: of the image tokens.
            aligned: names of the targets that have a loss. Of the others no sample is projected, so
                that their projectors have a gradient in each step, of zeros, with every engine.

        Returns:
            The velocity, and a dict which has for each target ``<name>`` ``[B, N, channels]``, or
            ``[0, N, channels]``.
        """
        velocity, outputs = self.module(
            *args, grid=grid, return_blocks=set(self._blocks.values()), **kwargs
        )
        for name, block in self._blocks.items():
            tokens = outputs[tokens_after(block)]
            rows = tokens if name in aligned else tokens[:0]
            outputs[name] = self.projectors[name](rows, grid)
        return velocity, outputs


def with_projectors(student: TinyFluxDeep, config: TrainerConfig) -> nn.Module:
    """What an engine trains: the student, in one module with the projectors, if there are any.

    Raises:
        ConfigError: a target is after a block that the student has not.
    """
    return AlignedStudent(student, config.align, config.seed) if config.align else student


def projector_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of a module's tensors, or what is known of them by name, that are its projectors'."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


@torch.no_grad()
def load_projectors(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a module of :func:`with_projectors` the projectors of a checkpoint.

    Raises:
        CheckpointError: they do not fit; nothing has changed then.
    """
    own = projector_tensors(module.state_dict())
    check_tensors(own, tensors, where)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def check_same_targets(state: TrainerState, config: TrainerConfig, run: str) -> None:
    """Refuse a run that goes on with other projectors than it trained; ConfigError.

    Args:
        run: names the run, or its checkpoint, in the error.
    """
    before, now = _fixed(state.trainer.get("align") or []), _fixed(to_dict(config.align))
    for targets, others, how in ((before, now, "with"), (now, before, "without")):
        for target in sorted(targets - others):
            described = dict(zip(FIXED, target, strict=True))
            raise ConfigError(
                f"{run} began {how} {described} in trainer.align: keep its targets (a target's "
                "stop ends it), or use a new run_dir"
            )


def _fixed(targets: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(target[name] for name in FIXED) for target in targets}
