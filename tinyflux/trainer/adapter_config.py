"""What a small adapter beside frozen weights is told."""

from dataclasses import dataclass, field

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

KINDS = ("lora", "dora")
# The projections of attention and the MLPs in all blocks, as adapters of FLUX take them.
BLOCK_PROJECTIONS = (
    "qkv", "out_proj", "img_qkv", "txt_qkv", "img_out", "txt_out", "fc1", "fc2",
)  # fmt: skip


@dataclass
class AdapterConfig:
    """An adapter that is trained in place of the weights, which stay as they are.

    Attributes:
        kind: ``"lora"`` (Hu et al. 2021, arXiv:2106.09685) or ``"dora"``, which also learns each
            row's length (Liu et al. 2024, arXiv:2402.09353).
        rank: Rank of the matrices that are added.
        alpha: They are scaled by ``alpha / rank``; None is ``rank``, a scale of 1.
        dropout: Share of a layer's inputs that the adapter does not see in training.
        target_modules: Names, or ends of names, of the linear layers that get one.

    Raises:
        ConfigError: a value that cannot work.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(BLOCK_PROJECTIONS))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"trainer.adapter.kind '{self.kind}' is unknown{nearest(self.kind, KINDS)}: "
                f"choose one of {', '.join(KINDS)}"
            )
        for name, value in (("rank", self.rank), ("alpha", self.scale_alpha)):
            if value < 1:
                raise ConfigError(f"trainer.adapter.{name} must be at least 1, not {value}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"trainer.adapter.dropout must be at least 0 and below 1, not {self.dropout}"
            )
        if not self.target_modules:
            raise ConfigError(
                "trainer.adapter.target_modules is empty: name the linear layers that get an "
                "adapter, or leave it out"
            )

    @property
    def scale_alpha(self) -> int:
        """``alpha``, also where it is left out."""
        return self.rank if self.alpha is None else self.alpha
