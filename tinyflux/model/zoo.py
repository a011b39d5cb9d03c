"""The frozen models, asked for encodings and for pictures."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from tinyflux.errors import ConfigError, InputError
from tinyflux.model.frozen_models import FrozenModels
from tinyflux.model.pictures import batches, downscale, encode_pictures
from tinyflux.model.pretrained import open_pretrained, open_vae_config
from tinyflux.model.text import CutTokens, t5_embeddings, tokenize

if TYPE_CHECKING:
    from transformers import T5EncoderModel, T5Tokenizer

logger = logging.getLogger(__name__)


class ModelZoo(FrozenModels):
    """Loads and runs the VAEs, text encoders and teachers.

    Args:
        device: where models run; ``"auto"`` is CUDA if there is one.
        dtype: of weights and encodings.
        vae_repo: holds the student's VAE, in ``vae/`` or at its root.
        t5_repo, clip_repo: text encoders with their tokenizers.
        experts_repo: holds ``lune/`` and ``sol/``, or single files of SD1.5's architecture.
        sd_repo: holds the teachers' VAE.
        t5_layers, max_text_length, text_padding: as in ``TinyFluxConfig``.
        vae_shift: taken off the student's latents; None means what the VAE's config says.
    """

    def __init__(
        self,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        vae_repo: str = "black-forest-labs/FLUX.1-dev",
        t5_repo: str = "google/flan-t5-base",
        clip_repo: str = "openai/clip-vit-large-patch14",
        experts_repo: str = "AbstractPhil/tinyflux-experts",
        sd_repo: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        t5_layers: Sequence[int] = (0, 4, 8, 12),
        max_text_length: int = 128,
        text_padding: str = "zero",
        vae_shift: float | None = None,
    ):
        super().__init__(device, dtype, vae_repo, t5_repo, clip_repo, experts_repo, sd_repo)
        self.t5_layers, self.max_text_length = tuple(t5_layers), max_text_length
        self.text_padding, self.vae_shift = text_padding, vae_shift
        self._vae_config: Mapping[str, Any] | None = None

    def load_t5(self) -> tuple["T5Tokenizer", "T5EncoderModel"]:
        """T5's tokenizer and encoder.

        Raises:
            ConfigError: ``t5_layers`` names a layer that it has not.
        """
        tokenizer, model = super().load_t5()
        last = model.config.num_layers
        if max(self.t5_layers) > last:
            raise ConfigError(
                f"t5_layers = {list(self.t5_layers)} names a layer above {last}, the last of "
                f"'{self.t5_repo}'"
            )
        return tokenizer, model

    @property
    def vae_scale(self) -> float:
        """The VAE's scaling factor (0.3611 for FLUX)."""
        return float(self.load_vae().config.scaling_factor)

    @property
    def latent_shift(self) -> float:
        """What is taken off the student's latents before scaling."""
        if self.vae_shift is not None:
            return self.vae_shift
        return float(getattr(self.load_vae().config, "shift_factor", None) or 0.0)

    @property
    def latent_channels(self) -> int:
        """Channels of the student's latents."""
        return int(self.load_vae().config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels per latent along a side, for which the VAE's config suffices."""
        if "vae" in self.loaded:
            return downscale(self.load_vae().config)
        if self._vae_config is None:
            self._vae_config = open_vae_config(self.vae_repo)
        return downscale(self._vae_config)

    def encode_image(self, image: Image.Image) -> Tensor:
        """Student latents ``[C, h, w]`` of one RGB picture."""
        return self.encode_images_batched([image])[0]

    def encode_images_batched(self, images: list[Image.Image], batch_size: int = 32) -> Tensor:
        """Student latents ``[N, C, h, w]``: the posterior's mode, shifted and scaled.

        Raises:
            InputError: not pictures, of several sizes, or sides that the VAE cannot halve.
        """
        vae = self.load_vae()
        factor: float = vae.config.scaling_factor
        return (encode_pictures(vae, images, batch_size) - self.latent_shift) * factor

    def encode_teacher_latents_batched(
        self, images: list[Image.Image], batch_size: int = 32
    ) -> Tensor:
        """The teachers' latents ``[N, C, h, w]``, from their own VAE as its config scales them."""
        vae = self.load_sd_vae()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        factor: float = vae.config.scaling_factor
        return (encode_pictures(vae, images, batch_size) - shift) * factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, shift: float | None = None) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1] of student latents ``[B, C, h, w]``.

        Args:
            shift: what was taken off them; None means :attr:`latent_shift`.
        """
        vae = self.load_vae()
        shift = self.latent_shift if shift is None else shift
        latents = latents.to(self.device, torch.float32) / vae.config.scaling_factor + shift
        pictures: Tensor = vae.decode(latents.to(self.dtype)).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 embedding ``[L, D]`` and pooled CLIP embedding ``[P]``."""
        t5, pooled = self.encode_prompts_batched([prompt])
        return t5[0], pooled[0]

    @torch.no_grad()
    def encode_prompts_batched(
        self,
        prompts: list[str],
        batch_size: int = 128,
        allow_empty: bool = False,
        warn_cut: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """T5 embeddings ``[N, L, D]`` and pooled CLIP embeddings ``[N, P]``.

        L is ``max_text_length``; T5's are :func:`tinyflux.model.text.t5_embeddings`. Of a prompt
        that is longer, each encoder reads as much as it can: see :meth:`cut_tokens`.

        Args:
            warn_cut: log how many prompts are cut; False where the caller says it.

        Raises:
            InputError: an empty prompt (unless ``allow_empty``), or something that is no text.
        """
        _check_prompts(prompts, allow_empty)
        if warn_cut:
            self._warn_of_cuts(prompts)
        tokenizer, model = self.load_t5()
        found = []
        for batch in batches(prompts, batch_size):
            tokens = tokenize(tokenizer, batch, self.max_text_length)
            ids, mask = tokens.ids.to(self.device), tokens.mask.to(self.device)
            found.append(t5_embeddings(model, ids, mask, self.t5_layers, self.text_padding))
        pooled = [output.pooler_output for output in self._run_clip(prompts, batch_size)]
        return torch.cat(found), torch.cat(pooled)

    @torch.no_grad()
    def encode_clip_tokens(self, prompts: list[str], batch_size: int = 128) -> Tensor:
        """CLIP's hidden states ``[N, T, D]``, which SD1.5 UNets are conditioned on.

        Prompts are cut as :meth:`encode_prompts_batched` cuts them for CLIP.
        """
        _check_prompts(prompts, allow_empty=True)
        outputs = self._run_clip(prompts, batch_size)
        return torch.cat([output.last_hidden_state for output in outputs])

    def t5_token_counts(self, prompts: list[str]) -> Tensor:
        """Tokens of each whole prompt ``[N]``, its end token included."""
        tokenizer = self.t5_tokenizer()
        return torch.tensor([len(ids) for ids in tokenizer(list(prompts)).input_ids])

    @cached_property
    def clip_limit(self) -> int:
        """How many tokens CLIP reads, its start and end among them: 77."""
        from transformers import CLIPTextConfig

        return int(open_pretrained(CLIPTextConfig, self.clip_repo).max_position_embeddings)

    def cut_tokens(self, prompts: Sequence[str]) -> list[CutTokens]:
        """How much of each prompt is beyond :attr:`clip_limit` and ``max_text_length``.

        Loads no model but the tokenizers.
        """
        if not prompts:
            return []
        clip = tokenize(self.clip_tokenizer(), prompts, self.clip_limit).cut.tolist()
        t5 = tokenize(self.t5_tokenizer(), prompts, self.max_text_length).cut.tolist()
        return [CutTokens(*counts) for counts in zip(clip, t5, strict=True)]

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        cut = self.cut_tokens(prompts)
        clip, t5 = sum(one.clip > 0 for one in cut), sum(one.t5 > 0 for one in cut)
        if clip or t5:
            logger.warning(
                "%d of %d prompts have more tokens than CLIP reads (%d) and %d more than T5 reads "
                "(%d): what is beyond is left out",
                clip, len(cut), self.clip_limit, t5, self.max_text_length,
            )  # fmt: skip

    def _run_clip(self, prompts: Sequence[str], batch_size: int) -> Iterator[Any]:
        tokenizer, model = self.load_clip()
        for batch in batches(prompts, batch_size):
            # CLIP was trained without a padding mask.
            yield model(tokenize(tokenizer, batch, self.clip_limit).ids.to(self.device))


def _check_prompts(prompts: Sequence[str], allow_empty: bool) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be text, not {type(prompt).__name__}")
        if not prompt.strip() and not allow_empty:
            raise InputError("a prompt is empty: say what the picture should show")
