"""What image tokens of a student are held against, beside the velocity."""

from collections.abc import Sequence
from dataclasses import dataclass

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

GROUPS = ("latents",)
PROJECTORS = ("mlp", "conv", "none")
ALIGN_LOSSES = ("cosine", "smooth_l1", "relations")


@dataclass
class AlignConfig:
    """A target of the image tokens after one of the student's blocks.

    Attributes:
        group: What they are held against: ``"latents"``, those of the clean picture.
        block: After which of the student's blocks, counted from 1 over the double and then the
            single ones.
        weight: Weight of this loss.
        projector: What is trained beside the student to predict the target from a token: ``"mlp"``,
            three linear layers, or ``"conv"``, a convolution of 3 x 3 tokens. ``"none"`` holds the
            tokens' own relations against the target's.
        loss: ``"cosine"``, ``"smooth_l1"``, or ``"relations"`` between all pairs of places.
        t_range: The smallest and the largest time of samples that have this loss; 0 is noise.
        stop: Share of the run after which it ends.
        shuffle: The control: hold each sample against the target of another one of its micro-batch.

    Raises:
        ConfigError: a value that cannot work.
    """

    group: str
    block: int
    weight: float = 0.5
    projector: str = "mlp"
    loss: str = "cosine"
    t_range: tuple[float, float] = (0.0, 1.0)
    stop: float = 1.0
    shuffle: bool = False

    def __post_init__(self) -> None:
        for name, valid in (
            ("group", GROUPS),
            ("projector", PROJECTORS),
            ("loss", ALIGN_LOSSES),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise ConfigError(
                    f"trainer.align: {name} '{value}' is unknown{nearest(value, valid)}: "
                    f"choose one of {', '.join(valid)}"
                )
        self.t_range = (self.t_range[0], self.t_range[1])
        low, high = self.t_range
        self._require("block", self.block >= 1, "at least 1")
        self._require("weight", self.weight > 0, "above 0")
        self._require("t_range", 0 <= low < high <= 1, "two times in [0, 1], the smaller first")
        self._require("stop", 0 < self.stop <= 1, "above 0 and at most 1")
        if self.projector == "none" and self.loss != "relations":
            raise ConfigError(
                f"trainer.align: projector 'none' leaves the tokens their own channels, which loss "
                f"'{self.loss}' cannot compare with the target's: use 'mlp', 'conv', or the loss "
                "'relations'"
            )

    @property
    def name(self) -> str:
        """What tells it from the run's other targets, such as ``latents_3``."""
        return f"{self.group}_{self.block}"

    def is_on(self, step: int, total_steps: int) -> bool:
        """Whether optimizer step ``step``, counted from 0, has this loss."""
        return step < self.stop * total_steps

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ConfigError(
                f"trainer.align: {name} must be {what}, not {getattr(self, name)!r} "
                f"(group '{self.group}')"
            )


def check_targets(targets: Sequence[AlignConfig]) -> None:
    """Refuse targets that could not be told apart; ConfigError."""
    names = [target.name for target in targets]
    for target in targets:
        if names.count(target.name) > 1:
            raise ConfigError(
                f"trainer.align names group '{target.group}' twice after block {target.block}: "
                "keep one of them, or use another block"
            )


def check_blocks(targets: Sequence[AlignConfig], blocks: int) -> None:
    """Refuse targets after blocks that a student of so many ``blocks`` has not; ConfigError."""
    for target in targets:
        if target.block > blocks:
            raise ConfigError(
                f"trainer.align: group '{target.group}' is after block {target.block}, and the "
                f"student has {blocks}, double and single: choose one from 1 to {blocks}"
            )
