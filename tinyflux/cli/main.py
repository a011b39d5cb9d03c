"""The command line: every job of ``ray_jobs/`` is also a subcommand of ``tinyflux``.

A command reads its settings before it imports what does the work, so that ``--help`` and a mistake
need not wait for it.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence

import tinyflux
from tinyflux.cli.local import FLAG, take_local
from tinyflux.errors import ConfigError, TinyFluxError
from tinyflux.util.logging import log_to_console
from tinyflux.util.processes import exit_on_sigterm

SETTINGS_HELP = "Settings are listed by `tinyflux train --help`."
EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130


def _cache(arguments: Sequence[str]) -> None:
    from tinyflux.cli.cache import cache

    cache(arguments)


def _train(arguments: Sequence[str]) -> None:
    from tinyflux.config import keep_run_config, parse_run_config

    local, settings = take_local(arguments)
    run = parse_run_config(settings, f"tinyflux train {FLAG}")
    train: Callable[..., str]
    if local:
        from tinyflux.distributed.train_local import train_local as train
    else:
        from tinyflux.distributed.train import train

    # Not before: a training that is refused must not overwrite the other one's.
    print(f"trained: {train(run, begin=lambda: keep_run_config(run))}", flush=True)


def _sample(arguments: Sequence[str]) -> None:
    from tinyflux.config import parse_run_config

    run = parse_run_config(arguments, "tinyflux sample")
    from tinyflux.distributed.sample import sample_prompts

    sample_prompts(run.sample, run.zoo)


def _serve(arguments: Sequence[str]) -> None:
    from tinyflux.config import parse_run_config

    run = parse_run_config(arguments, "tinyflux serve")
    from tinyflux.serving.app import run_server

    run_server(run.serve, run.zoo)


def _export(arguments: Sequence[str]) -> None:
    usage = "tinyflux export DIRECTORY --config FILE"
    what = "Write the run's student as a diffusers pipeline that needs no TinyFlux."
    place, rest = _first(usage, arguments, "where to", what)
    from tinyflux.config import parse_run_config

    run = parse_run_config(rest, "tinyflux export DIRECTORY")
    from tinyflux.pipeline.export import export
    from tinyflux.storage.copies import fetch

    assert run.sample.checkpoint is not None
    made = export(fetch(run.sample.checkpoint), run.zoo, place)
    print(f"exported {run.sample.checkpoint} to {made}")


def _ema(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="tinyflux ema",
        description="Write a run's average of another length, mixed out of the power-function EMAs "
        "that its checkpoints keep (trainer.ema_lengths).",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory or URL")
    parser.add_argument(
        "length", metavar="LENGTH", type=float, help="relative to the run's, such as 0.08"
    )
    parser.add_argument("output", metavar="DIRECTORY", help="where to: a new directory")
    options = parser.parse_args(arguments)
    from pathlib import Path

    from tinyflux.distributed.mix_ema import write_mixed_ema

    print(write_mixed_ema(options.run_dir, options.length, Path(options.output)))


def _first(
    usage: str, arguments: Sequence[str], about: str, description: str
) -> tuple[str, Sequence[str]]:
    """A command's first argument, which is no setting, and the settings after it.

    Args:
        usage: ``"tinyflux COMMAND NAME ..."``.
        about: what the first argument says, as the rest of "say ...".
    """
    program, command, name = usage.split()[:3]
    usage += " [--section.setting VALUE ...]"
    parser = argparse.ArgumentParser(
        prog=f"{program} {command}", usage=usage, description=description, epilog=SETTINGS_HELP
    )
    parser.add_argument("first", metavar=name, help=about)
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"say {about}: {usage}")
    return arguments[0], arguments[1:]


def _toy(arguments: Sequence[str]) -> None:
    from tinyflux.cli.toy import toy

    toy(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    from tinyflux.config import parse_run_config

    run = parse_run_config(arguments, "tinyflux evaluate")
    from tinyflux.report.evaluate import evaluate

    print(evaluate(run))


def _report(arguments: Sequence[str]) -> None:
    from tinyflux.config import parse_run_config

    run = parse_run_config(arguments, "tinyflux report")
    from tinyflux.report.report import write_report

    print(write_report(run))


def _run(arguments: Sequence[str]) -> None:
    what = (
        "Cache, train, evaluate and report, as one file says; what is done is not done again. With "
        "--local, cache and training do without Ray."
    )
    local, given = take_local(arguments)
    file, rest = _first(f"tinyflux run FILE {FLAG}", given, "which run", what)
    from tinyflux.report.stages import run_file

    exit_on_sigterm()
    print(run_file([file, *rest], local))


def _compare(arguments: Sequence[str]) -> None:
    what = "Train arms of a run over seeds, and say with error bars how they differ."
    usage = "tinyflux compare FILE"
    file, rest = _first(usage, arguments, "which comparison", what)
    from pathlib import Path

    from tinyflux.compare.config import load_compare_config

    config = load_compare_config(file, rest)
    from tinyflux.compare.run import run_comparison

    exit_on_sigterm()
    print(run_comparison(Path(file).stem, config))


def _demo(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tinyflux demo")
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args(arguments)
    from tinyflux.demo.run import run_demo

    exit_on_sigterm()
    print(run_demo(options.fresh))


def _plan(arguments: Sequence[str]) -> None:
    from contextlib import redirect_stdout

    from tinyflux.config import parse_run_config, stage_names
    from tinyflux.plan.plan import Plan, make_plan
    from tinyflux.plan.stages import StagedPlan, plan_stages

    parser = argparse.ArgumentParser(
        prog="tinyflux plan",
        usage="tinyflux plan FILE [--measure] [--calibrate] [--json] [--section.setting VALUE ...]",
        description="Say what a run will take of a cluster, before anything is spent.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="YAML run file, with a `cluster` section")
    parser.add_argument(
        "--measure", action="store_true", help="index the pictures and encode a few batches on Ray"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="train a few steps on this machine"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options, rest = parser.parse_known_args(arguments)
    given = ["--config", options.file, *rest]
    run = parse_run_config(given, "tinyflux plan", whole=True)
    with redirect_stdout(sys.stderr):  # what counting and measuring say of themselves
        print(f"plan: counting the work of {options.file}", flush=True)
        made: Plan | StagedPlan
        if names := stage_names(run):
            runs = {name: parse_run_config([*given, "--stage", name]) for name in names}
            made = plan_stages(runs, options.measure, options.calibrate)
        else:
            made = make_plan(run, options.measure, options.calibrate)
    print(made.to_json() if options.json else made)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "plan": ("say what a run will take of a cluster, before anything is spent", _plan),
    "cache": ("build a dataset from captioned pictures, and look after it", _cache),
    "train": ("train a student from a dataset", _train),
    "evaluate": ("measure a finished run against an untrained student", _evaluate),
    "report": ("write a finished run's report as one page", _report),
    "run": ("cache, train, evaluate and report, as one file says", _run),
    "compare": ("compare arms of a run over seeds, with error bars", _compare),
    "sample": ("draw pictures for prompts", _sample),
    "serve": ("answer prompts over HTTP", _serve),
    "ema": ("write a run's average of another length, chosen after it", _ema),
    "export": ("write a student as a diffusers pipeline that needs no TinyFlux", _export),
    "toy": ("the toy pictures and the toy world", _toy),
    "demo": ("the whole system on real pictures, from a checkout", _demo),
}


def run_job(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence on stderr, without a traceback.

    Returns:
        The exit status: 0, 2 for a mistake, 130 when interrupted.
    """
    # Workers' lines pass through here; in a pipe or a file they would wait for a full block.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    log_to_console()
    try:
        COMMANDS[name][1](sys.argv[1:] if arguments is None else arguments)
    except TinyFluxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("\nstopped: the same command continues from here", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


def main() -> int:
    """``tinyflux COMMAND ...``."""
    parser = argparse.ArgumentParser(
        prog="tinyflux", description="Train, distil and serve a compact text-to-image model."
    )
    parser.add_argument("--version", action="version", version=tinyflux.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    options, rest = parser.parse_known_args()
    return run_job(options.command, rest)
