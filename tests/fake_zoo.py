"""A zoo without models, for :data:`tests.students.MODEL`."""

import torch

from tests.students import MODEL


class FakeZoo:
    """Embeds a text by its letters and decodes a latent's first three channels."""

    def encode_prompts_batched(self, prompts, batch_size=128, allow_empty=False):
        assert allow_empty or all(prompt.strip() for prompt in prompts)
        self.encoded = [*getattr(self, "encoded", []), *prompts]
        t5 = torch.zeros(len(prompts), MODEL.max_text_length, MODEL.t5_hidden_size)
        pooled = torch.zeros(len(prompts), MODEL.pooled_projection_dim)
        for row, prompt in enumerate(prompts):
            for place, letter in enumerate(prompt[: MODEL.max_text_length]):
                t5[row, place] = ord(letter) / 100
            pooled[row] = len(prompt)
        return t5, pooled

    def decode_latents(self, latents, shift=None):
        assert shift == MODEL.latent_shift
        pixels = latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        return (pixels / 4 + 0.5).clamp(0, 1)
