"""The names of everything in a run's directory, which may be a path or a URL.

::

    config.yaml        the resolved settings
    checkpoints/       step_00001000/, epoch_0003/, ...; in each a trainer_state.json, written last
    passes.json        which shards of caches that were being built each pass reads
    metrics.jsonl      a line per log step
    best.json          the checkpoint that is best by trainer.best_metric, and its value
    samples/           grids that were drawn while training
    tb/                TensorBoard's files
    final/             the finished student; its training.json is written last
    ray/               Ray Train's own
    drawn/             pictures of `tinyflux sample`
    evaluation.json    figures of `tinyflux evaluate`; pictures and features are in evaluation/
    stages.json        which steps of `tinyflux run` are done
    stages/            a directory like this for each of the run file's stages, by name
    served.json        what the demo's server answered, with the picture in served.png
    report.html
    hardware.json      where a trial of `tinyflux compare` was trained
"""

CONFIG = "config.yaml"

CHECKPOINTS = "checkpoints"
CHECKPOINT_STATE = "trainer_state.json"
CHECKPOINT_EMA = "ema.safetensors"
CHECKPOINT_OPTIMIZER = "optimizer.safetensors"
CHECKPOINT_PROJECTORS = "projectors.safetensors"
_TRACK = ("ema_", ".safetensors")
PASSES = "passes.json"
METRICS = "metrics.jsonl"
BEST = "best.json"
SAMPLES = "samples"
TENSORBOARD = "tb"
FINAL = "final"
FINAL_STATE = "training.json"
RAY = "ray"

DRAWN = "drawn"

EVALUATION = "evaluation.json"
EVALUATION_PICTURES = "evaluation"
STAGES = "stages.json"
STAGE_RUNS = "stages"
SERVED = "served.json"
SERVED_PICTURE = "served.png"
REPORT = "report.html"
HARDWARE = "hardware.json"

# They say that what lies beside them is whole, so they come last and go first.
MARKS = (CHECKPOINT_STATE, FINAL_STATE)


def track_name(length: float) -> str:
    """A checkpoint's file of the power-function EMA of a ``length``, such as 0.05."""
    return f"{_TRACK[0]}{float(length)!r}{_TRACK[1]}"


def length_of_track(name: str) -> float | None:
    """Inverse of :func:`track_name`; None for other files."""
    start, end = _TRACK
    if not (name.startswith(start) and name.endswith(end)):
        return None
    return float(name.removeprefix(start).removesuffix(end))
