"""The student's own models of its two teachers.

In training, a teacher's feature replaces the student's prediction where it is at hand; the
prediction is distilled towards it and stands in at inference.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _mlp(*widths: int) -> list[nn.Module]:
    """Linear layers of these widths with SiLU between."""
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        layers += [nn.SiLU()] * (index > 0) + [nn.Linear(widths[index], widths[index + 1])]
    return layers


def choose(predicted: Tensor, teacher: Tensor | None, mask: Tensor | None) -> Tensor:
    """The teacher's feature where there is one, else the student's prediction.

    Args:
        predicted: ``[B, ...]``.
        teacher: the same shape, or None if no sample of the batch has one.
        mask: ``[B]`` bool, True where ``teacher`` counts; None means everywhere.
    """
    if teacher is None:
        return predicted
    teacher = teacher.to(predicted.dtype)
    if mask is None:
        return teacher
    return torch.where(mask.reshape(-1, *(1,) * (predicted.ndim - 1)), teacher, predicted)


class LunePredictor(nn.Module):
    """Predicts Lune's pooled mid-block feature and turns it into a conditioning vector."""

    def __init__(
        self, hidden_size: int, pooled_dim: int, expert_dim: int, width: int, dropout: float
    ):
        super().__init__()
        self.input_proj = nn.Linear(hidden_size + pooled_dim, width)
        self.predictor = nn.Sequential(
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, expert_dim),
        )
        self.output_proj = nn.Sequential(
            nn.LayerNorm(expert_dim), nn.Linear(expert_dim, hidden_size)
        )
        self.expert_gate = nn.Parameter(torch.zeros(()))  # sigmoid: half open at first

    def forward(
        self, time_vec: Tensor, pooled: Tensor, teacher: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            time_vec: ``[B, D]`` embedded time.
            pooled: ``[B, P]`` pooled CLIP embedding.
            teacher: ``[B, lune_expert_dim]`` or None; ``mask`` as in :func:`choose`.

        Returns:
            ``[B, D]`` to add to the conditioning vector, and the prediction
            ``[B, lune_expert_dim]``.
        """
        predicted = self.predictor(self.input_proj(torch.cat([time_vec, pooled], dim=-1)))
        signal = self.output_proj(choose(predicted, teacher, mask))
        return self.expert_gate.sigmoid() * signal, predicted


class SolPrior(nn.Module):
    """Predicts Sol's attention statistics and map, and turns them into an attention prior.

    What is used is a blend of a fixed function of time (``geometric_weight`` of it at first) and
    of the statistics and map.
    """

    def __init__(
        self,
        hidden_size: int,
        pooled_dim: int,
        width: int,
        num_heads: int,
        spatial_size: int,
        num_stats: int,
        geometric_weight: float,
    ):
        super().__init__()
        self.num_heads, self.spatial_size = num_heads, spatial_size
        source = hidden_size + pooled_dim
        self.stat_predictor = nn.Sequential(*_mlp(source, width, width, num_stats))
        self.spatial_predictor = nn.Sequential(*_mlp(source, width, width, spatial_size**2))
        self.stat_to_temperature = nn.Sequential(*_mlp(num_stats, width // 2, num_heads))
        # logit, so that the sigmoid starts at geometric_weight
        weight = min(max(geometric_weight, 1e-4), 1 - 1e-4)
        self.blend_gate = nn.Parameter(torch.tensor(math.log(weight / (1 - weight))))

    def forward(
        self,
        time_vec: Tensor,
        pooled: Tensor,
        t: Tensor,
        stats: Tensor | None,
        spatial: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            time_vec: ``[B, D]`` embedded time; pooled: ``[B, P]``; t: ``[B]`` time, fp32.
            stats: ``[B, S]`` and spatial: ``[B, s, s]`` of the teacher, or None; ``mask`` as in
                :func:`choose`.

        Returns:
            temperature ``[B]`` (mean over heads), blended map ``[B, s, s]``, predicted statistics
            ``[B, S]``, predicted map ``[B, s, s]`` in [0, 1].
        """
        source = torch.cat([time_vec, pooled], dim=-1)
        stats_pred = self.stat_predictor(source)
        spatial_pred = (
            self.spatial_predictor(source).sigmoid().unflatten(-1, (self.spatial_size,) * 2)
        )

        blend = self.blend_gate.sigmoid()
        learned = F.softplus(self.stat_to_temperature(choose(stats_pred, stats, mask)))
        temperature = blend * self._geometric_temperature(t) + (1 - blend) * learned
        blended = blend * self._geometric_spatial(t) + (1 - blend) * choose(
            spatial_pred, spatial, mask
        )
        return temperature.mean(-1).clamp(min=0.1), blended, stats_pred, spatial_pred

    def _geometric_temperature(self, t: Tensor) -> Tensor:
        """``[B, H]``: from about 1 at t = 0 to about 2 at t = 1, fanned out over the heads."""
        fan = torch.linspace(-0.2, 0.2, self.num_heads, device=t.device)
        return (1 + t[:, None] + fan).clamp(0.5, 3.0)

    def _geometric_spatial(self, t: Tensor) -> Tensor:
        """``[B, s, s]``: centred at t = 0, uniform at t = 1."""
        axis = torch.linspace(-1, 1, self.spatial_size, device=t.device)
        centred = torch.exp(-2 * torch.hypot(axis[:, None], axis[None, :]))
        return torch.lerp(centred, torch.ones_like(centred), t[:, None, None])
