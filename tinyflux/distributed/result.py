"""What a finished run leaves: ``final/``, with weights, config, model card and a grid."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyflux import run_dir as names
from tinyflux.data.mixture import CacheMixture
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.model.adapters import has_adapter, trained_on
from tinyflux.model.model import TinyFluxDeep
from tinyflux.storage.folder import Folder
from tinyflux.trainer.card import model_card
from tinyflux.trainer.checkpoint import save_student
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.upload import Uploader
from tinyflux.util.config import to_dict
from tinyflux.util.files import atomic_write, file_sha256, full_disk_ends_run

CARD, GRID = "README.md", "samples.png"


def read_result(run: Folder) -> dict[str, Any]:
    """What the result in a run's folder says of itself; nothing where there is none."""
    try:
        record: dict[str, Any] = json.loads(run.read(f"{names.FINAL}/{names.FINAL_STATE}"))
    except (OSError, ValueError):
        return {}
    return record


def is_finished(job: TrainingJob) -> bool:
    """Whether ``final/`` holds the result of all of the run's steps."""
    return int(read_result(job.folder).get("step", -1)) >= job.trainer.total_steps


def write_result(
    job: TrainingJob,
    model: TinyFluxDeep,
    averaged: Mapping[str, Tensor],
    data: CacheMixture,
    state: TrainerState,
) -> None:
    """Write ``final/`` from the EMA's whole weights, and upload it where the run is told to."""
    config = job.trainer
    with full_disk_ends_run(job.run_dir):
        files = save_student(model, job.final, averaged)
        base = trained_on(model).name if has_adapter(model) else None
        count = sum(tensor.numel() for tensor in averaged.values())
        beside = _describe(job, data, count, base)
        record = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "seed": config.seed,
            "files": {files[0]: file_sha256(job.final / files[0])},
            "init_from": state.init_from,
        }
        # Last of all: it says that the result is whole.
        atomic_write(job.final / names.FINAL_STATE, json.dumps(record, indent=2).encode())
    if config.hf_repo_id is not None:
        uploader = Uploader(config.hf_repo_id, job.root / ".uploads")
        uploader.submit(job.final, "", (*files, *beside))
        uploader.close()


def _describe(
    job: TrainingJob, data: CacheMixture, parameters: int, base: str | None
) -> tuple[str, ...]:
    """Write the model card, and the last grid beside it; the files' names."""
    drawn = sorted(job.paths.samples.glob("step_*.png"))
    if drawn:
        atomic_write(job.final / GRID, drawn[-1].read_bytes())
    learned = {"Lune": job.teaches_lune, "Sol": job.teaches_sol}
    card = model_card(
        title=job.trainer.hf_repo_id or job.root.name,
        source=job.trainer.hf_repo_id or names.FINAL,
        parameters=parameters,
        model=job.model,
        trainer=to_dict(job.trainer),
        records=read_metrics(job.paths.metrics),
        data=[
            f"`{Path(source.path).name}` (weight {source.weight:g}): {len(cache)} rows, manifest "
            f"SHA-256 `{cache.digest}`"
            for source, cache in zip(data.sources, data.caches, strict=True)
        ],
        teachers=[name for name, used in learned.items() if used],
        grid=GRID if drawn else None,
        base=base,
    )
    atomic_write(job.final / CARD, card.encode())
    return (CARD, GRID) if drawn else (CARD,)
