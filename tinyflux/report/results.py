"""Where an evaluation's figures go beside its own file: the model card and the trackers."""

from tinyflux.config import RunConfig
from tinyflux.distributed.mirror import working_copy
from tinyflux.distributed.result import CARD
from tinyflux.evaluation.record import Measured
from tinyflux.run_dir import FINAL, METRICS, TENSORBOARD
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.card import with_figures
from tinyflux.trainer.direction import MEASURED
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.trackers import open_trackers
from tinyflux.util.config import to_dict


def pass_on_figures(run: RunConfig, measured: Measured) -> None:
    """Put the finished student's figures into its model card and the run's trackers.

    The trackers are told of them at the step of the run's last record; a card that is not there is
    not made.
    """
    folder, trainer = open_folder(run.run_dir), run.trainer
    card = f"{FINAL}/{CARD}"
    if folder.size(card) is not None:
        title = trainer.hf_repo_id or folder.name
        text = with_figures(folder.read(card).decode(), title, measured)
        folder.write(card, text.encode())
    if not trainer.trackers:
        return
    with working_copy(run.run_dir) as run_dir:
        step = max((record["step"] for record in read_metrics(run_dir / METRICS)), default=0)
        trackers = open_trackers(
            trainer.trackers,
            run_dir,
            run_dir / TENSORBOARD,
            trainer.tracker_project,
            to_dict(trainer),
            step,
        )
        for tracker in trackers:
            tracker.write(step, named_figures(measured))
            tracker.close()


def named_figures(measured: Measured) -> dict[str, float]:
    """The figures by one name each, such as ``eval_pairs_kid``, as trackers want them.

    Those of a set's first extractor have no more; another one's have its kind behind, such as
    ``eval_pairs_kid_clip``, and its place where two are of one kind.
    """
    values: dict[str, float] = {}
    for chosen in measured.sets:
        kinds: list[str] = []
        for place, space in enumerate(chosen.spaces):
            kind = space.extractor.partition(":")[0]
            suffix = f"_{kind}{place if kind in kinds else ''}" if place else ""
            kinds.append(kind)
            values |= {
                f"{MEASURED}{chosen.name}_{name}{suffix}": one.value
                for name, one in space.figures.items()
            }
    return values
