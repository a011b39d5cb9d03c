"""The student's configuration, and that of the frozen models."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tinyflux.errors import ConfigError
from tinyflux.util.config import from_dict, to_dict

if TYPE_CHECKING:
    from tinyflux.model.zoo import ModelZoo

# Keys of published v4.2 configs that have another name here.
_PUBLISHED_NAMES = {"joint_attention_dim": "t5_hidden_size"}
# What published checkpoints were trained with and their configs do not say.
PUBLISHED_SETTINGS: dict[str, Any] = {
    "t5_layers": (12,),
    "use_cross_attention_sharing": False,
    "sol_num_stats": 3,
    "text_padding": "encoder",
    "latent_shift": 0.0,
}

_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "attention_head_dim",
    "lune_expert_dim",
    "lune_hidden_dim",
    "sol_spatial_size",
    "sol_hidden_dim",
    "t5_hidden_size",
    "in_channels",
    "pooled_projection_dim",
    "max_text_length",
    "patch_size",
)


@dataclass
class TinyFluxConfig:
    """Everything that fixes the student's architecture and what its inputs mean.

    Attributes:
        hidden_size: Width D of the model; it is ``num_attention_heads * attention_head_dim``.
        num_attention_heads: Number of attention heads in every block.
        attention_head_dim: Channels of a head.
        num_double_layers: Number of blocks in which text and image have their own weights.
        num_single_layers: Number of blocks over one joint sequence.
        mlp_ratio: Width of a block's MLP over ``hidden_size``.
        use_lune_expert: Predict Lune's pooled mid-block feature and condition on it.
        lune_expert_dim: Width of Lune's feature.
        lune_hidden_dim: Width of the Lune predictor.
        freeze_lune: Keep the Lune predictor's weights as they are.
        use_sol_prior: Predict Sol's attention statistics and map, and steer attention by them.
        sol_spatial_size: Side of Sol's map.
        sol_hidden_dim: Width of the Sol predictor.
        sol_geometric_weight: Share of the fixed, time-dependent prior at the start, in [0, 1].
        freeze_sol: Keep the Sol predictor's weights as they are.
        t5_layers: T5 hidden states whose RMS-normalised mean is the text embedding (0 is the
            embedding output); a single last layer is taken as it is.
        t5_hidden_size: Width of the text embedding.
        use_cross_attention_sharing: Use one text-side q/k/v projection for all double blocks.
        axes_dims_rope: Channels of a head for (frame, row, column); they add up to
            ``attention_head_dim``.
        theta: Base of the rotary embedding's frequencies.
        in_channels: Channels of a latent.
        pooled_projection_dim: Width of the pooled CLIP embedding.
        lune_dropout: Dropout inside the Lune predictor.
        use_t5_vec: Condition on pooled T5 tokens beside pooled CLIP.
        sol_num_stats: Number of Sol's statistics: 4, or 3 (without sparsity) as in published
            checkpoints.
        max_text_length: Text positions L that the model sees.
        text_padding: What stands after a caption's last token: ``"zero"`` vectors, or
            ``"encoder"``, T5's outputs there, as published checkpoints were trained.
        latent_shift: The shift taken off VAE latents before scaling.
        timestep_shift: The sampler's time shift (see ``trainer.schedules.flux_shift``).
        timestep_shift_tokens: The picture's latents (height x width) at which ``timestep_shift``
            holds, if it depends on the size (see ``trainer.schedules.shift_at``); None: it does
            not.
        patch_size: Side of a token in latents: 1, or 2 as in FLUX, which makes a quarter of the
            tokens of a picture.
        qk_norm: Norm queries and keys of each head, as FLUX and SD3.5 do.
        gated_single_mlp: Gate the single blocks' MLP by the conditioning vector.
        mask_text_padding: Leave the text's padding out of attention; needs ``text_padding`` to be
            ``"zero"``.
        time_scale: What times in [0, 1] are multiplied by before they are embedded; 1,000 in FLUX.
        sol_standardize: Measure Sol's features against their mean and spread over the training
            pictures, which the weights then carry, and scale maps to mean 1. Published checkpoints
            do neither.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    hidden_size: int = 1536
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    num_double_layers: int = 4
    num_single_layers: int = 8
    mlp_ratio: float = 4.0

    use_lune_expert: bool = True
    lune_expert_dim: int = 1280
    lune_hidden_dim: int = 512
    freeze_lune: bool = False

    use_sol_prior: bool = True
    sol_spatial_size: int = 8
    sol_hidden_dim: int = 256
    sol_geometric_weight: float = 0.7
    freeze_sol: bool = False

    t5_layers: tuple[int, ...] = (0, 4, 8, 12)
    t5_hidden_size: int = 768
    use_cross_attention_sharing: bool = True

    axes_dims_rope: tuple[int, ...] = (16, 24, 24)
    theta: int = 10000

    in_channels: int = 16
    pooled_projection_dim: int = 768
    lune_dropout: float = 0.0
    use_t5_vec: bool = True
    sol_num_stats: int = 4
    max_text_length: int = 128
    text_padding: str = "zero"
    latent_shift: float = 0.1159
    timestep_shift: float = 3.0
    timestep_shift_tokens: int | None = None
    sol_standardize: bool = False
    patch_size: int = 1
    qk_norm: bool = False
    gated_single_mlp: bool = False
    mask_text_padding: bool = False
    time_scale: float = 1.0

    @property
    def token_channels(self) -> int:
        """Channels of an image token: those of its latents."""
        return self.in_channels * self.patch_size**2

    @property
    def num_blocks(self) -> int:
        """Blocks that an image token passes, double and single ones."""
        return self.num_double_layers + self.num_single_layers

    def __post_init__(self) -> None:
        self.t5_layers = tuple(self.t5_layers)
        self.axes_dims_rope = tuple(self.axes_dims_rope)
        self._check_sizes()
        self._check_heads()
        self._check_rope()
        self._check_text()
        self._check_sol()
        self._check_times()

    def _check_sizes(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.num_double_layers < 0 or self.num_single_layers < 0:
            raise ConfigError("model.num_double_layers and num_single_layers must not be negative")

    def _check_heads(self) -> None:
        heads, width = self.num_attention_heads, self.attention_head_dim
        if self.hidden_size % heads:
            raise ConfigError(
                f"model.num_attention_heads = {heads} does not divide "
                f"model.hidden_size = {self.hidden_size}"
            )
        if self.hidden_size != heads * width:
            raise ConfigError(
                f"model.hidden_size = {self.hidden_size} must be num_attention_heads * "
                f"attention_head_dim = {heads} * {width} = {heads * width}"
            )

    def _check_rope(self) -> None:
        axes, width = list(self.axes_dims_rope), self.attention_head_dim
        if len(axes) != 3 or sum(axes) != width:
            raise ConfigError(
                f"model.axes_dims_rope = {axes} must be three numbers that "
                f"add up to attention_head_dim = {width}, not {sum(axes)}"
            )
        if any(dim < 0 or dim % 2 for dim in axes):
            raise ConfigError(
                f"model.axes_dims_rope = {axes} must hold even numbers: "
                f"rotary embedding turns channels in pairs"
            )
        if self.theta <= 0:
            raise ConfigError(f"model.theta must be above 0, not {self.theta}")

    def _check_text(self) -> None:
        if not self.t5_layers or any(layer < 0 for layer in self.t5_layers):
            raise ConfigError(
                f"model.t5_layers = {list(self.t5_layers)} must name at least one layer, "
                f"counted from 0 (the embedding output)"
            )
        if self.text_padding not in ("zero", "encoder"):
            raise ConfigError(
                f"model.text_padding must be 'zero' or 'encoder', not '{self.text_padding}'"
            )
        if self.mask_text_padding and self.text_padding != "zero":
            raise ConfigError(
                f"model.mask_text_padding needs model.text_padding: zero: padding of "
                f"'{self.text_padding}' cannot be told from text"
            )

    def _check_sol(self) -> None:
        if not 0 <= self.sol_geometric_weight <= 1:
            raise ConfigError(
                f"model.sol_geometric_weight must be in [0, 1], not {self.sol_geometric_weight}"
            )
        if self.sol_num_stats not in (3, 4):
            raise ConfigError(f"model.sol_num_stats must be 3 or 4, not {self.sol_num_stats}")

    def _check_times(self) -> None:
        if self.time_scale <= 0:
            raise ConfigError(f"model.time_scale must be above 0, not {self.time_scale}")
        if self.timestep_shift <= 0:
            raise ConfigError(f"model.timestep_shift must be above 0, not {self.timestep_shift}")
        if self.timestep_shift_tokens is not None and self.timestep_shift_tokens < 1:
            raise ConfigError(
                f"model.timestep_shift_tokens must be 1 or more, not {self.timestep_shift_tokens}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` gives an equal config."""
        plain: dict[str, Any] = to_dict(self)
        return plain

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "the model config"
    ) -> "TinyFluxConfig":
        """From :meth:`to_dict`, or from the config of a published v4.2 checkpoint.

        Keys that start with an underscore are comments.

        Raises:
            ConfigError: an unknown key or an impossible value; ``where`` names the source.
        """
        data = {key: value for key, value in data.items() if not key.startswith("_")}
        if _PUBLISHED_NAMES.keys() & data.keys():
            for old, new in _PUBLISHED_NAMES.items():
                if old in data:
                    data[new] = data.pop(old)
            data = {**PUBLISHED_SETTINGS, **data}
        return from_dict(cls, data, where)


@dataclass
class ZooConfig:
    """The frozen models; what they are asked for comes from the student's config.

    Attributes:
        vae_repo: A hub repository or directory with the student's VAE, in ``vae/`` or at its root.
        t5_repo: A hub repository or directory with T5's encoder and its tokenizer.
        clip_repo: A hub repository or directory with CLIP's text model and its tokenizer.
        experts_repo: A hub repository or directory with the teachers: ``lune/`` and ``sol/``, or
            single files of SD1.5's architecture.
        sd_repo: A hub repository or directory with the teachers' VAE.
        device: Where the models run; ``"auto"`` is CUDA if there is one, else the CPU.
        dtype: Precision of weights and encodings: float32, bfloat16 or float16.
    """

    vae_repo: str = "black-forest-labs/FLUX.1-dev"
    t5_repo: str = "google/flan-t5-base"
    clip_repo: str = "openai/clip-vit-large-patch14"
    experts_repo: str = "AbstractPhil/tinyflux-experts"
    sd_repo: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    device: str = "auto"
    dtype: torch.dtype = torch.float32

    def build(self, model: TinyFluxConfig) -> "ModelZoo":
        """A zoo whose encodings are what ``model`` is trained on."""
        # Only here: reading a run file must not wait for transformers and diffusers.
        from tinyflux.model.zoo import ModelZoo

        return ModelZoo(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            t5_layers=model.t5_layers,
            max_text_length=model.max_text_length,
            text_padding=model.text_padding,
            vae_shift=model.latent_shift,
        )
