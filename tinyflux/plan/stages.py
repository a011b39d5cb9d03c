"""A plan of trainings one after another, as ``stages`` of a run file are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB
from tinyflux.errors import ConfigError
from tinyflux.plan.plan import Plan, make_plan
from tinyflux.util.text import duration, rounded


@dataclass(frozen=True)
class StagedPlan:
    """Stages, planned.

    Attributes:
        stages: by name, in order.
        hours: of all of them; a cache that several have is built once.
        price: of the cluster for so long; 0 if no price is stated.
    """

    stages: dict[str, Plan]
    hours: float
    price: float

    def to_json(self) -> str:
        """The plans and their sums, for programs."""
        data: dict[str, Any] = {
            "stages": {name: json.loads(plan.to_json()) for name, plan in self.stages.items()},
            "hours": self.hours,
            "price": self.price,
        }
        return json.dumps(data, indent=1)

    def __str__(self) -> str:
        parts = [f"stage {name}\n\n{plan}" for name, plan in self.stages.items()]
        money = f", {rounded(self.price)} at the stated price" if self.price else ""
        return "\n\n".join([*parts, f"all stages: {duration(3600 * self.hours)}{money}"])


def plan_stages(
    runs: Mapping[str, RunConfig], measured: bool = False, calibrated: bool = False
) -> StagedPlan:
    """Plan each of ``runs``, by name in order; see :func:`tinyflux.plan.plan.make_plan`.

    Raises:
        ConfigError: what cannot fit, or what nobody stated; all together, too.
    """
    plans: dict[str, Plan] = {}
    hours, price, kept = 0.0, 0.0, 0.0
    built: set[str] = set()
    for name, run in runs.items():
        try:
            plan = make_plan(run, measured, calibrated)
        except ConfigError as error:
            raise ConfigError(f"stage '{name}': {error}") from error
        plans[name] = plan
        again = run.cache.path in built
        built.add(run.cache.path)
        spent = plan.hours - (plan.cache.hours or 0.0 if again else 0.0)
        hours += spent
        price += spent * plan.nodes * run.cluster.price_per_node_hour
        kept += plan.training.bytes_kept + (0.0 if again else plan.cache.total_bytes)
    room = max((run.cluster.storage_gb for run in runs.values()), default=0.0)
    if room and kept > room * GB:
        raise ConfigError(
            f"the caches and checkpoints of all stages ({kept / GB:.1f} GB) do not fit "
            f"cluster.storage_gb = {room:g}: use more storage, lower trainer.keep_last_n_steps, or "
            "let stages share a cache"
        )
    return StagedPlan(plans, hours, price)
