"""One YAML run file for every job, with overrides from the command line."""

import argparse
import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import docstring_parser
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type

from tinyflux import run_dir
from tinyflux.cache.config import CacheConfig, DataConfig, MixSource
from tinyflux.distributed.config import ClusterConfig, SampleConfig, WorkersConfig
from tinyflux.errors import ConfigError
from tinyflux.evaluation.config import EvaluateConfig
from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.model.presets import preset
from tinyflux.serving.config import ServeConfig
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util import config as plain
from tinyflux.util.config import dtype_name, nearest, parse_dtype
from tinyflux.util.files import atomic_write
from tinyflux.util.text import first_line
from tinyflux.util.urls import check_url, is_url, join

logger = logging.getLogger(__name__)

OPTIONS = {"config", "help", "print_config", "stage"}
# What a stage may not change.
OF_ALL_STAGES = ("run_dir", "preset", "stages", "cluster")
EXAMPLE = """example:
  {prog} --config configs/demo.yaml --run_dir runs/mine --trainer.learning_rate 3e-4

A setting of the command line counts before the file's, and the file's before the preset's."""

register_type(torch.dtype, serializer=dtype_name, deserializer=parse_dtype)


@dataclass
class RunConfig:
    """Everything about a run.

    Attributes:
        run_dir: Where the run writes, a directory or a URL.
        preset: Model settings to start from: s, b or l (for new students, by size), default (the
            API document's), tiny-flux-deep (the published checkpoints') or toy (the demo's);
            ``model`` changes single ones.
        data: Captioned pictures, and at which sizes they are encoded.
        zoo: The frozen models: encoders and teachers.
        cache: How the dataset is built from the pictures.
        model: The student's architecture and what its inputs mean.
        trainer: Training.
        workers: The processes that train.
        sample: Pictures that `tinyflux sample` draws.
        serve: The server and its limits.
        evaluate: What `tinyflux evaluate` measures.
        mix: Caches to train on together, with weights; left empty, ``cache.path`` alone.
        cluster: What `tinyflux plan` plans for; no other command reads it.
        stages: Trainings one after another, as lower resolutions before higher ones, each from the
            weights of the one before: a list of a ``name`` and the settings in which a stage
            differs from the rest of the file.
    """

    run_dir: str = "runs/run"
    preset: str = "default"
    data: DataConfig = field(default_factory=DataConfig)
    zoo: ZooConfig = field(default_factory=ZooConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    model: TinyFluxConfig = field(default_factory=TinyFluxConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    mix: list[MixSource] = field(default_factory=list)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stages: list[dict[str, Any]] = field(default_factory=list)


def parse_run_config(
    arguments: Sequence[str], prog: str = "tinyflux train", whole: bool = False
) -> RunConfig:
    """``--config FILE`` and overrides such as ``--trainer.learning_rate 3e-4``.

    Relative paths become absolute, so that workers elsewhere see the same places. Of a file with
    stages it is the run of one of them: that of ``--stage NAME``, else the last one.

    Args:
        arguments: what was typed; ``--help`` prints every setting and ends the process.
        prog: the command, for its help.
        whole: keep a file with stages as it is, where no stage is named.

    Raises:
        ConfigError: one sentence that names the key or value.
    """
    names = setting_names()
    defaults = RunConfig()
    for option, value in _options(arguments):
        _check_name(option, names | OPTIONS, "--")
        if option == "preset" and value:
            defaults.preset = value
        elif option == "config" and value:
            settings = _read_yaml(value)
            for name in _keys(settings):
                _check_name(name, names, f"{value}: ")
            defaults.preset = str(settings.get("preset", defaults.preset))
    # The preset decides the model's defaults, so it is known before anything is parsed.
    defaults.model = preset(defaults.preset)
    values = _parse(arguments, prog, defaults)
    stage = values.pop("stage")
    run = plain.from_dict(RunConfig, values.as_dict(), "the run's config")
    stages = check_stages(run.stages, names)
    if stages and not (whole and stage is None):
        run = stage_run(run, stages[-1] if stage is None else stage)
    elif stage is not None:
        raise ConfigError(f"--stage {stage}: this run has no stages")
    _resolve_paths(run)
    _warn_of_former_names(run)
    return run


def stage_names(run: RunConfig) -> list[str]:
    """The names of a run's stages, in order; none where it is a single training."""
    return [str(stage["name"]) for stage in run.stages]


def check_stages(stages: Sequence[Mapping[str, Any]], settings: set[str]) -> list[str]:
    """The names of stages, in order.

    Args:
        settings: dotted names of all settings.

    Raises:
        ConfigError: a stage without a usable name, or one that changes what is none of its own.
    """
    found: list[str] = []
    for stage in stages:
        name = str(stage.get("name", ""))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in found:
            raise ConfigError(
                f"each of stages needs a name of its own, of letters, digits, '.', '_' and '-', "
                f"not '{name}'"
            )
        found.append(name)
        for key in _keys({key: value for key, value in stage.items() if key != "name"}):
            if key in OF_ALL_STAGES:
                raise ConfigError(f"stage '{name}': {key} is the same for all stages")
            _check_name(key, settings, f"stage '{name}': ")
    return found


def stage_run(run: RunConfig, name: str) -> RunConfig:
    """The run of one stage, below the whole run's directory and from the stage before it.

    Raises:
        ConfigError: there is no such stage, or it cannot work.
    """
    names = stage_names(run)
    if name not in names:
        raise ConfigError(
            f"--stage {name} is not a stage{nearest(name, names)}: choose one of {', '.join(names)}"
        )
    at = names.index(name)
    changes = {key: value for key, value in run.stages[at].items() if key != "name"}
    settings = _merged(plain.to_dict(run), plain.to_dict(changes))
    settings["stages"] = []
    settings["run_dir"] = join(run.run_dir, f"{run_dir.STAGE_RUNS}/{name}")
    if at and "init_from" not in changes.get("trainer", {}):
        before = join(run.run_dir, f"{run_dir.STAGE_RUNS}/{names[at - 1]}")
        settings["trainer"]["init_from"] = before
    return plain.from_dict(RunConfig, settings, f"stage '{name}'")


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with ``changes`` in their place, section by section."""
    merged = dict(settings)
    for key, value in changes.items():
        inner = merged.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def load_run_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run file at ``path``; see :func:`parse_run_config`."""
    return parse_run_config(["--config", os.fspath(path), *overrides])


def save_run_config(run: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML; :func:`load_run_config` gives an equal one."""
    atomic_write(path, _yaml(run))


def keep_run_config(run: RunConfig) -> None:
    """Write the resolved config as ``config.yaml`` into the run's directory."""
    # Only here: reading a run file must not wait for pyarrow.
    from tinyflux.storage.remote import open_folder

    try:
        open_folder(run.run_dir).write(run_dir.CONFIG, _yaml(run))
    except OSError as error:
        raise ConfigError(
            f"run_dir '{run.run_dir}' cannot be written: {first_line(error)}"
        ) from error


def kept_run_config(place: str) -> RunConfig | None:
    """What :func:`keep_run_config` wrote into the run's directory ``place``; None if nothing."""
    from tinyflux.storage.remote import open_folder

    try:
        kept = open_folder(place).read(run_dir.CONFIG)
    except FileNotFoundError:
        return None
    return plain.from_dict(RunConfig, yaml.safe_load(kept), f"{place}/{run_dir.CONFIG}")


def _yaml(run: RunConfig) -> bytes:
    return yaml.safe_dump(plain.to_dict(run), sort_keys=False).encode()


class _Help(DefaultHelpFormatter):
    """Sentences without the quotes of their docstrings, and examples line by line."""

    def _expand_help(self, action: argparse.Action) -> str:
        return super()._expand_help(action).replace("``", "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def _parser(prog: str, defaults: RunConfig) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} --config FILE [--section.setting VALUE ...]",
        epilog=EXAMPLE.format(prog=prog),
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="A YAML run file.")
    parser.add_argument(
        "--stage", metavar="NAME", help="One of the run file's stages; left out, the last one."
    )
    sentences = {
        param.arg_name: param.description
        for param in docstring_parser.parse(RunConfig.__doc__).params
    }
    for item in dataclasses.fields(RunConfig):
        parser.add_argument(
            f"--{item.name}",
            type=item.type,
            default=getattr(defaults, item.name),
            help=sentences[item.name],
        )
    return parser


def _parse(arguments: Sequence[str], prog: str, defaults: RunConfig) -> Namespace:
    parser = _parser(prog, defaults)
    try:
        values = parser.parse_args(list(arguments))
    except ConfigError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError("; ".join(lines[:3])) from error
    del values["config"]
    return values


def setting_names() -> set[str]:
    """Dotted names of every setting and section, and ``name.*`` where any key is a setting."""
    return set(_names(RunConfig()))


def _names(value: Any, prefix: str = "") -> Iterator[str]:
    types = get_type_hints(type(value))
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        yield prefix + item.name
        if dataclasses.is_dataclass(inner):
            yield from _names(inner, f"{prefix}{item.name}.")
        elif isinstance(inner, dict):
            yield f"{prefix}{item.name}.*"
        elif inner is None:  # a section that is left out may be given
            for section in filter(dataclasses.is_dataclass, get_args(types[item.name])):
                for field_ in dataclasses.fields(section):
                    yield f"{prefix}{item.name}.{field_.name}"


def _keys(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _check_name(name: str, names: set[str], where: str) -> None:
    if name not in names and f"{name.rpartition('.')[0]}.*" not in names:
        raise ConfigError(f"{where}{name} is not a setting{nearest(name, names)}")


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each ``--name=value`` or ``--name value`` in turn; the value is empty where none follows."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, value if equals else following


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the run file '{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"the run file '{path}' is not YAML: {first:.200}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"the run file '{path}' must hold settings by name")
    return data


def _resolve_paths(run: RunConfig) -> None:
    run.run_dir = _resolved_folder(run.run_dir)
    last = f"{run_dir.STAGE_RUNS}/{stage_names(run)[-1]}/" if run.stages else ""
    final = join(run.run_dir, last + run_dir.FINAL)
    run.sample.checkpoint = run.sample.checkpoint or final
    run.sample.output_dir = run.sample.output_dir or join(run.run_dir, run_dir.DRAWN)
    if not run.serve.models:
        run.serve.checkpoint = run.serve.checkpoint or final
    for section, name in (
        (run.data, "folder"),
        (run.cache, "path"),
        (run.sample, "checkpoint"),
        (run.sample, "output_dir"),
        (run.sample, "prompts_file"),
        (run.evaluate, "checkpoint"),
        (run.trainer, "init_from"),
        *((chosen, "file") for chosen in [*run.evaluate.sets, run.evaluate.trained_on] if chosen),
        (run.serve, "checkpoint"),
        (run.serve, "api_keys_file"),
        *((source, "path") for source in run.mix),
        *((run.zoo, f"{repo}_repo") for repo in ("vae", "t5", "clip", "experts", "sd")),
    ):
        if value := getattr(section, name):
            setattr(section, name, _resolved(value))
    run.serve.models = {name: _resolved(place) for name, place in run.serve.models.items()}
    run.serve.adapters = {name: _resolved(place) for name, place in run.serve.adapters.items()}


def _warn_of_former_names(run: RunConfig) -> None:
    """Say what to write instead, once: processes that are handed the run do not read it again."""
    for section in (run.sample, run.trainer, run.serve):
        if warning := section.former_sides.warning(section):
            logger.warning(warning)


def _resolved_folder(value: str) -> str:
    check_url(value)
    return value.rstrip("/") if is_url(value) else os.path.abspath(value)


def _resolved(value: str) -> str:
    check_url(value)
    # A name with one slash that is no file here is a hub repository.
    local = "://" not in value and (os.path.exists(value) or value.count("/") != 1)
    return os.path.abspath(value) if local and ":" not in value else value
