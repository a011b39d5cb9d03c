"""The student's own models of its two teachers.

In training, a teacher's feature replaces the student's prediction where it is at hand; the
prediction is distilled towards it and stands in at inference.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflux.util.buckets import default_buckets, interpolate_buckets

# A smaller spread than this over pictures is the rounding of a cache's fp16.
_LEAST_SPREAD = 1e-3


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
        """Predict Lune's feature and condition on it, or on the teacher's.

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


class SolUnits(nn.Module):
    """Sol's features in units of what the training pictures have in common and differ by.

    In these units every feature has mean 0 and variance 1 over the training pictures at every time:
    the best guess that knows the time alone is 0, and its mean squared error is 1. Maps are scaled
    to mean 1 first.

    Buffers, of the ten times of :func:`tinyflux.util.buckets.default_buckets`: ``stats_mean`` and
    ``stats_std`` ``[10, S]``, ``map_mean`` ``[10, s, s]``, ``map_std`` ``[10]``, and ``measured``,
    a bool scalar. Until :meth:`measure` they change no more than a map's scale.
    """

    stats_mean: Tensor
    stats_std: Tensor
    map_mean: Tensor
    map_std: Tensor
    measured: Tensor

    def __init__(self, spatial_size: int, num_stats: int):
        super().__init__()
        times = len(default_buckets())
        self.register_buffer("stats_mean", torch.zeros(times, num_stats))
        self.register_buffer("stats_std", torch.ones(times, num_stats))
        self.register_buffer("map_mean", torch.ones(times, spatial_size, spatial_size))
        self.register_buffer("map_std", torch.ones(times))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def measure(self, stats: Tensor, spatial: Tensor, t_buckets: Tensor) -> None:
        """Take mean and spread of these pictures' features.

        Args:
            stats: ``[n, K, S or more]`` and spatial: ``[n, K, s, s]``, as the teacher gives them.
            t_buckets: ``[K]`` their times.
        """
        for index, time in enumerate(default_buckets()):
            t = time.expand(len(stats))
            values = interpolate_buckets(stats.float(), t_buckets, t)
            values = values[:, : self.stats_mean.shape[1]]
            maps = _mean_one(interpolate_buckets(spatial.float(), t_buckets, t))
            self.stats_mean[index] = values.mean(0)
            self.stats_std[index] = values.std(0, correction=0).clamp(min=_LEAST_SPREAD)
            self.map_mean[index] = maps.mean(0)
            self.map_std[index] = maps.var(0, correction=0).mean().sqrt().clamp(min=_LEAST_SPREAD)
        self.measured.fill_(True)

    def standardise(self, stats: Tensor, spatial: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics ``[B, S]`` and maps ``[B, s, s]`` of times ``t`` ``[B]`` in these units."""
        stats_mean, stats_std, map_mean, map_std = self._at(t)
        maps = (_mean_one(spatial.float()) - map_mean) / map_std
        return (stats.float() - stats_mean) / stats_std, maps

    def restore(self, stats: Tensor, spatial: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`standardise`."""
        stats_mean, stats_std, map_mean, map_std = self._at(t)
        maps = map_mean + map_std * spatial.float()
        return stats_mean + stats_std * stats.float(), maps / maps[0].numel()

    def _at(self, t: Tensor) -> list[Tensor]:
        """Each of the four at times ``t`` ``[B]``, fp32; the spread of maps as ``[B, 1, 1]``."""
        tables = (self.stats_mean, self.stats_std, self.map_mean, self.map_std[:, None, None])
        times = default_buckets(t.device)
        return [
            interpolate_buckets(table.float().expand(len(t), *table.shape), times, t)
            for table in tables
        ]


def _mean_one(maps: Tensor) -> Tensor:
    """Maps ``[..., s, s]`` that sum to 1, scaled so that an even one is 1 everywhere."""
    return maps * (maps.shape[-1] * maps.shape[-2])


class SolPrior(nn.Module):
    """Predicts Sol's attention statistics and map, and turns them into an attention prior.

    What is used is a blend of a fixed function of time (``geometric_weight`` of it at first) and
    of the statistics and map.

    With ``standardize`` the predictors work in the units of :class:`SolUnits`, from 0 at first,
    temperatures come from statistics in these units, and the maps that are blended have mean 1.
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
        standardize: bool = False,
    ):
        super().__init__()
        self.num_heads, self.spatial_size = num_heads, spatial_size
        self.units = SolUnits(spatial_size, num_stats) if standardize else None
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
        """Predict Sol's statistics and map, and what attention is steered by.

        Args:
            time_vec: ``[B, D]`` embedded time; pooled: ``[B, P]``; t: ``[B]`` time, fp32.
            stats: ``[B, S]`` and spatial: ``[B, s, s]`` of the teacher, or None; ``mask`` as in
                :func:`choose`.

        Returns:
            temperature ``[B]`` (mean over heads), blended map ``[B, s, s]``, predicted statistics
            ``[B, S]``, predicted map ``[B, s, s]``: like the teacher's, or each in [0, 1] without
            ``standardize``.
        """
        source = torch.cat([time_vec, pooled], dim=-1)
        stats_pred = self.stat_predictor(source)
        spatial_pred = self.spatial_predictor(source).unflatten(-1, (self.spatial_size,) * 2)
        geometric = self._geometric_spatial(t)
        if self.units is None:
            spatial_pred = spatial_pred.sigmoid()
            stats_used = choose(stats_pred, stats, mask)
            spatial_used = choose(spatial_pred, spatial, mask)
        else:
            spatial_pred = spatial_pred - spatial_pred.mean((-2, -1), keepdim=True)
            units_pred = stats_pred
            stats_pred, spatial_pred = self.units.restore(stats_pred, spatial_pred, t)
            if stats is not None and spatial is not None:
                stats, _ = self.units.standardise(stats, spatial, t)
            stats_used = choose(units_pred, stats, mask)
            spatial_used = _mean_one(choose(spatial_pred, spatial, mask))
            geometric = geometric / geometric.mean((-2, -1), keepdim=True)

        blend = self.blend_gate.sigmoid()
        learned = F.softplus(self.stat_to_temperature(stats_used))
        temperature = blend * self._geometric_temperature(t) + (1 - blend) * learned
        blended = blend * geometric + (1 - blend) * spatial_used
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
