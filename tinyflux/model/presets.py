"""Students by name."""

import dataclasses
from typing import Any

from tinyflux.errors import ConfigError
from tinyflux.model.config import PUBLISHED_SETTINGS, TinyFluxConfig
from tinyflux.util.config import nearest

# What the presets for new students have in common, most of it FLUX's: patches of 2 quarter the
# tokens, norms of queries and keys bear higher rates, and padding is no text. Times are shifted as
# SD3 does (Esser et al. 2024, arXiv:2403.03206): not at 256 px, towards noise above.
_NEW_SETTINGS: dict[str, Any] = {
    "attention_head_dim": 64,
    "patch_size": 2,
    "qk_norm": True,
    "gated_single_mlp": True,
    "mask_text_padding": True,
    "time_scale": 1000.0,
    "sol_standardize": True,
    "timestep_shift": 1.0,
    "timestep_shift_tokens": 1024,
}

PRESETS: dict[str, TinyFluxConfig] = {
    "default": TinyFluxConfig(),
    # The published checkpoints' 245M parameters.
    "tiny-flux-deep": TinyFluxConfig(
        hidden_size=512,
        num_attention_heads=4,
        attention_head_dim=128,
        num_double_layers=15,
        num_single_layers=25,
        axes_dims_rope=(16, 56, 56),
        lune_dropout=0.1,
        **PUBLISHED_SETTINGS,
    ),
    # 100M, 250M and 596M parameters, for runs of their own.
    "s": TinyFluxConfig(
        hidden_size=512,
        num_attention_heads=8,
        num_double_layers=5,
        num_single_layers=12,
        **_NEW_SETTINGS,
    ),
    "b": TinyFluxConfig(
        hidden_size=768,
        num_attention_heads=12,
        num_double_layers=6,
        num_single_layers=13,
        **_NEW_SETTINGS,
    ),
    "l": TinyFluxConfig(
        hidden_size=1152,
        num_attention_heads=18,
        num_double_layers=6,
        num_single_layers=15,
        **_NEW_SETTINGS,
    ),
    # What the demo and the tests train, on the toy world's encoders.
    "toy": TinyFluxConfig(
        hidden_size=128,
        num_attention_heads=4,
        attention_head_dim=32,
        num_double_layers=2,
        num_single_layers=4,
        lune_expert_dim=128,
        lune_hidden_dim=128,
        sol_hidden_dim=64,
        t5_layers=(0, 1, 2, 3),
        t5_hidden_size=128,
        axes_dims_rope=(8, 12, 12),
        pooled_projection_dim=128,
        max_text_length=16,
        latent_shift=-0.0153,  # the toy VAE's own
        timestep_shift=1.0,
        sol_standardize=True,
    ),
}


def preset(name: str) -> TinyFluxConfig:
    """A copy of the preset ``name``, one of :data:`PRESETS`."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset '{name}'{nearest(name, PRESETS)}: choose one of {', '.join(PRESETS)}"
        )
    return dataclasses.replace(PRESETS[name])
