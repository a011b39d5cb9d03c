"""A comparison's file: arms, seeds and what is measured, and the run of each trial."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tinyflux import run_dir
from tinyflux.config import RunConfig, parse_run_config, setting_names
from tinyflux.errors import ConfigError
from tinyflux.trainer.direction import HELD_OUT, MEASURED, lower_is_better
from tinyflux.util.config import from_dict, nearest
from tinyflux.util.urls import check_url, is_url, join

BASE = "base"
OUTPUTS = "runs/compare"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# A comparison decides about these itself.
_OWN = {
    "run_dir": "a trial's directory is below `output`",
    "trainer.seed": "say `seeds`, and `seed_offset` for an arm of other seeds",
    "trainer.init_by_name": "it is on in every trial, so that first weights are paired",
}


@dataclass
class CompareConfig:
    """What is compared with what.

    Attributes:
        output: Where everything is written, a URL or a directory that all nodes see; left empty,
            ``runs/compare/`` and the file's name.
        base: A run file that every arm begins with; None: the defaults, and ``preset`` of
            ``settings``.
        settings: Settings of every arm, the base's too, which count before the run file's, such as
            ``trainer.total_steps: 600``.
        arms: Name of each arm, and the settings in which it differs from the base; none at all
            make an arm that is the base once more. The base itself is run as the arm ``base``.
        control_of: Control arms, each with the arm that it is the control of: that arm is compared
            to it as well as to the base.
        seed_offset: Added to the seeds of an arm, which then is not paired with the others: what
            the seed alone does.
        seeds: Seeds of the trials of every arm, a list, or a number n for 0 to n - 1.
        metric: The one that decides, named before the run: a number of ``metrics.jsonl``.
        lower_is_better: Whether less of it is better; None: as is known of the metric.
        metrics: More numbers that are shown, each better in the direction that is known of it.
        concurrent: Trials at a time, as far as the cluster has room.
        max_failures: How often a trial whose process died goes on from its checkpoint.
    """

    output: str = ""
    base: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    control_of: dict[str, str] = field(default_factory=dict)
    seed_offset: dict[str, int] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    metric: str = "val_velocity_ema"
    lower_is_better: bool | None = None
    metrics: list[str] = field(default_factory=list)
    concurrent: int = 2
    max_failures: int = 2

    def __post_init__(self) -> None:
        for name in self.arms:
            if not _NAME.fullmatch(name) or name == BASE:
                raise ConfigError(
                    f"arms: '{name}' cannot be an arm's name: letters, digits, _, . and - can, and "
                    f"'{BASE}' is what every arm is compared to"
                )
        if not self.arms:
            raise ConfigError("arms: name at least one, with the settings in which it differs")
        for section in ("control_of", "seed_offset"):
            for name in getattr(self, section):
                self._require_arm(name, section)
        for control, arm in self.control_of.items():
            self._require_arm(arm, f"control_of: {control}")
            if arm == control:
                raise ConfigError(f"control_of: '{arm}' cannot be its own control")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError("seeds must be a number from 1, or different whole numbers from 0")
        if self.concurrent < 1 or self.max_failures < 0:
            raise ConfigError("concurrent must be at least 1, and max_failures at least 0")
        check_url(self.output)

    def _require_arm(self, name: str, where: str) -> None:
        if name not in self.arms:
            raise ConfigError(f"{where}: there is no arm '{name}'{nearest(name, self.arms)}")

    def lower_is_better_of(self, metric: str) -> bool:
        """Whether less of one of the numbers is better."""
        if metric == self.metric and self.lower_is_better is not None:
            return self.lower_is_better
        return lower_is_better(metric)

    @property
    def names(self) -> list[str]:
        """All arms, the base first."""
        return [BASE, *self.arms]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Arms and what each is compared to: the base, and its controls."""
        controls = [(arm, control) for control, arm in self.control_of.items()]
        return [*((arm, BASE) for arm in self.arms), *controls]


@dataclass(frozen=True)
class Trial:
    """One arm with one seed.

    Attributes:
        seed: by which trials of different arms are paired; the run's own may differ by the arm's
            ``seed_offset``.
        run: a run as any other, in a directory of its own.
    """

    arm: str
    seed: int
    run: RunConfig

    @property
    def name(self) -> str:
        """``arm/seed-0``, also its directory below ``<output>/runs``."""
        return f"{self.arm}/seed-{self.seed}"


def load_compare_config(path: str, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read a comparison's file.

    Args:
        overrides: settings of every arm as ``--section.setting VALUE``, which are added to the
            file's ``settings``.

    Raises:
        ConfigError: one sentence that names the key.
    """
    data = _read(path)
    if type(data.get("seeds")) is int:
        data["seeds"] = list(range(data["seeds"]))
    data["arms"] = {name: arm or {} for name, arm in (data.get("arms") or {}).items()}
    known = [item.name for item in fields(CompareConfig)]
    for key in data:
        if key not in known:
            raise ConfigError(f"{path}: '{key}' is no part of a comparison{nearest(key, known)}")
    try:
        config = from_dict(CompareConfig, data, path)
    except ConfigError as error:
        where = "" if str(error).startswith(path) else f"{path}: "
        raise ConfigError(f"{where}{error}") from None
    config.settings = _flat(config.settings, f"{path}: settings") | _typed(overrides)
    config.arms = {name: _flat(arm, f"{path}: arms: {name}") for name, arm in config.arms.items()}
    output = config.output or join(OUTPUTS, Path(path).stem)
    return replace(config, output=output if is_url(output) else str(Path(output).absolute()))


def make_trials(config: CompareConfig) -> list[Trial]:
    """Every arm with every seed, a seed after the other, as the comparison's settings say.

    Raises:
        ConfigError: a value that cannot work, or settings under which arms cannot be compared.
    """
    arms = {name: _arm_run(config, name) for name in config.names}
    for name, run in arms.items():
        _check_measured(config, name, run)
    _check_caches(arms)
    return [
        Trial(name, seed, _trial_run(config, name, seed, run))
        for seed in config.seeds
        for name, run in arms.items()
    ]


def _read(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the comparison '{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"the comparison '{path}' is not YAML: {first:.200}") from error
    if not isinstance(data, dict) or not isinstance(data.get("arms") or {}, dict):
        raise ConfigError(f"the comparison '{path}' must hold `arms` by name, and what they share")
    return data


def _flat(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by dotted name, be they nested in the file or not."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where} must hold settings by name")
    names = setting_names()
    flat = dict(_leaves(settings, names))
    for name in flat:
        if name in _OWN:
            raise ConfigError(f"{where}: {name} is not for an arm to set: {_OWN[name]}")
        if name not in names:
            raise ConfigError(f"{where}: {name} is not a setting{nearest(name, names)}")
    return flat


def _leaves(
    settings: Mapping[str, Any], names: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and any(one.startswith(f"{name}.") for one in names):
            yield from _leaves(value, names, f"{name}.")
        else:
            yield name, value


def _typed(overrides: Sequence[str]) -> dict[str, Any]:
    """What was typed as ``--name=value`` or ``--name value``, by name."""
    found: dict[str, Any] = {}
    rest = list(overrides)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"'{option}' is no setting: write --section.setting VALUE")
        name, equals, value = option[2:].partition("=")
        if not equals and not rest:
            raise ConfigError(f"--{name} has no value")
        found |= _flat({name: yaml.safe_load(value if equals else rest.pop(0))}, "the command line")
    return found


def _arm_run(config: CompareConfig, arm: str) -> RunConfig:
    file = [] if config.base is None else ["--config", config.base]
    settings = {**config.settings, **config.arms.get(arm, {}), "trainer.init_by_name": True}
    given = [f"--{name}={as_typed(value)}" for name, value in settings.items()]
    try:
        return parse_run_config([*file, *given], "tinyflux compare FILE")
    except ConfigError as error:
        raise ConfigError(f"the arm '{arm}': {error}") from error


def as_typed(value: Any) -> str:
    """A setting's value as one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def trial_place(arm: str, seed: int) -> str:
    """A trial's directory in the comparison's."""
    return f"runs/{arm}/seed-{seed}"


def _trial_run(config: CompareConfig, arm: str, seed: int, run: RunConfig) -> RunConfig:
    """The arm's run with a seed and a directory of its own."""
    place = join(config.output, trial_place(arm, seed))
    final = join(place, run_dir.FINAL)
    own_seed = seed + config.seed_offset.get(arm, 0)
    return replace(
        run,
        run_dir=place,
        trainer=replace(run.trainer, seed=own_seed),
        sample=replace(run.sample, checkpoint=final, output_dir=join(place, run_dir.DRAWN)),
        serve=run.serve if run.serve.models else replace(run.serve, checkpoint=final),
    )


def _check_measured(config: CompareConfig, arm: str, run: RunConfig) -> None:
    """Refuse a comparison that would end without its metric."""
    for prefix, setting in ((HELD_OUT, "validate_every"), (MEASURED, "evaluate_every")):
        wanted = [name for name in (config.metric, *config.metrics) if name.startswith(prefix)]
        every = getattr(run.trainer, setting)
        if wanted and (every is None or not run.trainer.val_fraction):
            raise ConfigError(
                f"the arm '{arm}' records no {wanted[0]}: it needs trainer.{setting} and a "
                "trainer.val_fraction above 0"
            )


def _check_caches(arms: Mapping[str, RunConfig]) -> None:
    """Refuse arms that would build the same cache differently, one after the other."""
    first: dict[str, tuple[str, RunConfig]] = {}
    for name, run in arms.items():
        check_url(run.cache.path)
        other, same = first.setdefault(run.cache.path, (name, run))
        if (run.data, run.zoo, run.cache) != (same.data, same.zoo, same.cache):
            raise ConfigError(
                f"the arms '{other}' and '{name}' would build the cache '{run.cache.path}' from "
                "different settings: give one of them a cache.path of its own"
            )
