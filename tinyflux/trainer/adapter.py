"""A training of an adapter: the weights that it begins on, and how it goes on."""

import os
from typing import Any

from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.model.adapters import BaseWeights, add_adapter
from tinyflux.model.files import WEIGHTS_NAME
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import fingerprint
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.init_from import FirstWeights, Places, WeightsFile, begin_from
from tinyflux.util.config import to_dict
from tinyflux.util.urls import is_url

# What fixes an adapter's tensors and what they mean; its dropout may change.
FIXED = ("kind", "rank", "scale_alpha", "target_modules")


def begin_adapter(
    file: WeightsFile, model: TinyFluxDeep, config: TrainerConfig, places: Places
) -> FirstWeights:
    """Give ``model`` the weights in ``file``, and the adapter of ``config`` on them.

    Raises:
        CheckpointError: the weights are damaged, or do not fit the model.
        ConfigError: they lack what training needs, or the adapter does not fit them.
    """
    begun = begin_from(file, model, config.init_from or str(file), places, carry=False)
    if config.enable_sol and model.sol_units is not None and not model.sol_units.measured:
        raise ConfigError(
            f"trainer.init_from '{file}' was trained without the teacher Sol, and an adapter "
            "cannot add the units of its features: set trainer.enable_sol to false"
        )
    fit_adapter(model, config, BaseWeights(_opened_as(file), fingerprint(model.state_dict())))
    return begun


def _opened_as(file: WeightsFile) -> str:
    """What opens the weights again, from wherever the adapter will be used."""
    place = file.place if file.name in ("", WEIGHTS_NAME) else str(file)
    return os.path.abspath(place) if not is_url(place) and os.path.exists(place) else place


def fit_adapter(
    model: TinyFluxDeep, config: TrainerConfig, base: BaseWeights | None = None
) -> None:
    """Give ``model`` the adapter that ``config`` asks for, if any, to be filled with its weights.

    Args:
        base: what the model's weights are, for whoever writes the adapter.
    """
    adapter = config.adapter
    if adapter is not None:
        add_adapter(
            model,
            kind=adapter.kind,
            rank=adapter.rank,
            alpha=adapter.scale_alpha,
            dropout=adapter.dropout,
            target_modules=adapter.target_modules,
            seed=config.seed,
            base=base or BaseWeights(),
        )


def check_same_adapter(state: TrainerState, config: TrainerConfig, run: str) -> None:
    """Refuse a run that goes on if it trained another adapter, or none; ConfigError.

    Args:
        run: names the run, or its checkpoint, in the error.
    """
    before, now = _fixed(state.trainer.get("adapter")), _fixed(to_dict(config.adapter))
    if before == now:
        return
    if not before or not now:
        what = "without trainer.adapter" if now else "with trainer.adapter"
        raise ConfigError(f"{run} began {what}: keep it so, or use a new run_dir")
    name = next(name for name in FIXED if before[name] != now[name]).removeprefix("scale_")
    raise ConfigError(
        f"{run} began with another trainer.adapter.{name}: keep it, or use a new run_dir"
    )


def _fixed(adapter: dict[str, Any] | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    alpha = adapter["rank"] if adapter["alpha"] is None else adapter["alpha"]
    return {name: {**adapter, "scale_alpha": alpha}[name] for name in FIXED}


def check_same_base(state: TrainerState, begun: FirstWeights, run: str) -> None:
    """Refuse to go on with an adapter on other weights; CheckpointError."""
    if begun.sha256 != state.init_from.get("sha256"):
        raise CheckpointError(
            f"{run} trains an adapter on the weights of {state.init_from.get('source')}, and "
            f"trainer.init_from '{begun.source}' holds others now: name those that it began with, "
            "or use a new run_dir"
        )
