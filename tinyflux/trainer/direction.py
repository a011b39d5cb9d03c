"""Which way each of a run's numbers is better."""

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

HELD_OUT, MEASURED = "val_", "eval_"  # before the names of held-out losses and of figures

_LOSSES = ("velocity", "lune", "sol", "sol_relative")
_LOWER = ("kid", "fid", "cmmd")
_HIGHER = ("precision", "recall", "density", "coverage", "clip_score", "retrieval")


def lower_is_better(metric: str) -> bool:
    """Whether less of a number of ``metrics.jsonl`` is better; of what is unknown, it is."""
    return _figure_of(metric) not in _HIGHER


def check_metric(metric: str) -> None:
    """Refuse what is neither a held-out loss nor a figure of pictures with a ConfigError."""
    losses = [f"{HELD_OUT}{name}{ema}" for name in _LOSSES for ema in ("", "_ema")]
    if metric not in losses and _figure_of(metric) is None:
        known = [*losses, *(f"{MEASURED}{name}" for name in (*_LOWER, *_HIGHER))]
        raise ConfigError(
            f"'{metric}' is no number that a checkpoint is judged by{nearest(metric, known)}: "
            f"choose one of {', '.join(known)}"
        )


def _figure_of(metric: str) -> str | None:
    """``clip_score`` of ``eval_clip_score`` or ``eval_clip_score_clip``; None for what is none."""
    if not metric.startswith(MEASURED):
        return None
    name = metric.removeprefix(MEASURED)
    known = (*_LOWER, *_HIGHER)
    return next((one for one in known if name == one or name.startswith(f"{one}_")), None)
