"""A tiny student, and batches of random samples that fit it."""

from dataclasses import replace

import torch

from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.dropout import install
from tinyflux.trainer.step import TrainBatch

MODEL = TinyFluxConfig(
    hidden_size=48,
    num_attention_heads=3,
    attention_head_dim=16,
    num_double_layers=1,
    num_single_layers=1,
    lune_expert_dim=20,
    lune_hidden_dim=16,
    lune_dropout=0.3,
    sol_hidden_dim=16,
    t5_hidden_size=24,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 6),
    in_channels=4,
    max_text_length=5,
)


def student(**changes):
    torch.manual_seed(0)
    model = TinyFluxDeep(replace(MODEL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    install(model)
    return model.train()


def make_batch(size=12, height=4, width=6, seed=1):
    torch.manual_seed(seed)
    spatial = torch.rand(size, 10, 8, 8)
    return TrainBatch(
        latents=torch.randn(size, 4, height, width),
        t5_embeds=torch.randn(size, 5, 24),
        clip_pooled=torch.randn(size, 12),
        positions=torch.arange(100, 100 + size),
        lune=torch.randn(size, 10, 20),
        sol_stats=torch.rand(size, 10, 4),
        sol_spatial=spatial / spatial.sum((-2, -1), keepdim=True),
        lune_mask=torch.rand(size) < 0.6,
        sol_mask=torch.rand(size) < 0.6,
        mask=(torch.rand(size, height, width) < 0.5).float(),
    )
