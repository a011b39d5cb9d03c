"""Pictures from prompts, the way diffusers' users expect."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.model.model import TinyFluxConfig
from tinyflux.model.text import Tokens, t5_embeddings, tokenize
from tinyflux.model.time_shift import shift_at

logger = logging.getLogger(__name__)
Callback = Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any]]


def make_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Diffusers' Euler scheduler for the student's time, which runs from 0 (noise) to 1 (data).

    diffusers counts noise levels down: ``sigma = 1 - t``. With them inverted it steps along ``t``
    and takes the student's ``data - noise`` as it is. A shift of ``t`` by s is one of sigma by 1/s.
    """
    return FlowMatchEulerDiscreteScheduler(shift=1 / shift, invert_sigmas=True)


class TinyFluxPipeline(DiffusionPipeline):
    """A student with its text encoders and VAE.

    Args:
        transformer: a :class:`~tinyflux.pipeline.transformer.TinyFluxTransformer`; diffusers loads
            that class anew for every pipeline, and would not know it again by name.
        text_encoder, tokenizer: CLIP's. text_encoder_2, tokenizer_2: T5's.
        scheduler: of :func:`make_scheduler`.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5Tokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def student_config(self) -> TinyFluxConfig:
        """The student's settings."""
        config: TinyFluxConfig = self.transformer.student.config
        return config

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 28,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw.

        Args:
            negative_prompt: what to steer away from; empty is the null caption. Unused at a
                ``guidance_scale`` of 1.
            height, width: in pixels, multiples of the VAE's steps (8).
            generator: one for the whole batch, or one for each picture.
            latents: ``[B, C, h, w]`` noise instead of the generator's.
            output_type: ``"pil"``, ``"np"``, ``"pt"``, or ``"latent"`` for what the VAE would get.
            callback_on_step_end: called as ``f(pipeline, step, timestep, tensors)`` after each
                step with the tensors asked for; it may return others in their place.

        Raises:
            ValueError: sizes that the VAE cannot make, or tensors that
                the callback cannot have.
        """
        self._check_inputs(height, width, callback_on_step_end_tensor_inputs)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        config, step = self.student_config, self.vae_scale_factor
        shape = (len(prompts), config.in_channels, height // step, width // step)

        cond = self.encode_prompt(prompts)
        uncond = self._uncond(negative_prompt, cond) if guidance_scale != 1 else None
        latents = self._first_latents(shape, latents, generator)
        times = self._set_times(num_inference_steps, shape[2] * shape[3])
        with self.progress_bar(total=num_inference_steps) as bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                t = torch.full((shape[0],), times[index], device=self._execution_device)
                velocity = guided_velocity(
                    self._forward, latents, t, cond, uncond, guidance_scale, config.patch_size
                )
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tell = partial(callback_on_step_end, self, index, int(timestep))
                    asked = callback_on_step_end_tensor_inputs
                    latents, cond = self._told(tell, asked, latents, cond)
                bar.update()

        images = latents if output_type == "latent" else self._pictures(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts: list[str]) -> TextCondition:
        """T5's embeddings ``[B, L, D]`` and CLIP's pooled ones ``[B, P]``.

        Of a prompt that is longer, each encoder reads as much as it can, and a warning says so.
        """
        config, device = self.student_config, self._execution_device
        dtype = self.transformer.dtype
        tokens = _tokens("T5", self.tokenizer_2, prompts, config.max_text_length)
        t5 = t5_embeddings(
            self.text_encoder_2, tokens.ids.to(device), tokens.mask.to(device), config.t5_layers,
            config.text_padding,
        )  # fmt: skip
        limit = self.text_encoder.config.max_position_embeddings
        tokens = _tokens("CLIP", self.tokenizer, prompts, limit)
        pooled = self.text_encoder(tokens.ids.to(device)).pooler_output
        return TextCondition(t5.to(dtype), pooled.to(dtype))

    def _uncond(self, negative_prompt: str, cond: TextCondition) -> TextCondition:
        """The negative prompt for each of the prompts of ``cond``."""
        null = self.encode_prompt([negative_prompt])
        return TextCondition(null.t5.expand_as(cond.t5), null.pooled.expand_as(cond.pooled))

    def _check_inputs(self, height: int, width: int, asked: Sequence[str]) -> None:
        """Refuse sizes that cannot be drawn, and tensors that a callback cannot have."""
        unknown = set(asked) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: choose from "
                f"{self._callback_tensor_inputs}"
            )
        patch, step = self.student_config.patch_size, self.vae_scale_factor
        side = patch * step
        if height % side or width % side or min(height, width) < side:
            raise ValueError(
                f"height {height} and width {width} must be multiples of {side}: the VAE makes "
                f"{step} pixels of a latent, and the student takes {patch} x {patch} latents as one"
            )

    def _first_latents(
        self,
        shape: tuple[int, ...],
        given: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Noise ``[B, C, h, w]`` in fp32: the caller's, or the generator's."""
        device = self._execution_device
        if given is None:
            given = randn_tensor(shape, generator, device, torch.float32)
        elif given.shape != shape:
            raise ValueError(f"latents must be {list(shape)}, not {list(given.shape)}")
        return given.to(device, torch.float32)

    def _set_times(self, num_steps: int, area: int) -> list[float]:
        """Set the scheduler to the student's shift in pictures of ``area`` latents; its sigmas."""
        config = self.student_config
        shift = shift_at(config.timestep_shift, area, config.timestep_shift_tokens)
        self.scheduler.set_shift(1 / shift)
        sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=self._execution_device)
        times: list[float] = self.scheduler.sigmas.tolist()
        return times

    def _told(
        self,
        tell: Callable[[dict[str, Any]], dict[str, Any]],
        asked: Sequence[str],
        latents: Tensor,
        cond: TextCondition,
    ) -> tuple[Tensor, TextCondition]:
        """The latents and the condition after a callback, which may have given others."""
        known = {
            "latents": latents, "prompt_embeds": cond.t5, "pooled_prompt_embeds": cond.pooled
        }  # fmt: skip
        given = tell({name: known[name] for name in asked}) or {}
        place = {"device": self._execution_device, "dtype": self.transformer.dtype}
        return given.get("latents", latents), TextCondition(
            given.get("prompt_embeds", cond.t5).to(**place),
            given.get("pooled_prompt_embeds", cond.pooled).to(**place),
        )

    def _pictures(self, latents: Tensor, output_type: str) -> Any:
        """Latents through the VAE, as ``output_type`` says."""
        offset = self.student_config.latent_shift
        if offset is None:
            offset = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        scaled = latents / self.vae.config.scaling_factor + offset
        decoded = self.vae.decode(scaled.to(self.vae.dtype)).sample.float()
        return self.image_processor.postprocess(decoded, output_type=output_type)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.transformer(*args, **kwargs)


def _tokens(name: str, tokenizer: Any, prompts: list[str], limit: int) -> Tokens:
    """Prompts as ``limit`` tokens each; a warning says how many were longer."""
    tokens = tokenize(tokenizer, prompts, limit)
    if longer := int(tokens.cut.count_nonzero()):
        logger.warning(
            "%d of %d prompts have more than the %d tokens that %s reads: what is beyond is left "
            "out", longer, len(prompts), limit, name,
        )  # fmt: skip
    return tokens
