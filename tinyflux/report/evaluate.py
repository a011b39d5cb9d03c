"""Do a run's pictures follow their prompts? Figures against an untrained student and chance."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyflux.cache.config import MixSource
from tinyflux.cache.dataset import CachedDataset
from tinyflux.config import RunConfig
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import read_held_out
from tinyflux.distributed.evaluate import measure
from tinyflux.distributed.mirror import working_copy
from tinyflux.distributed.ray_session import ensure_ray
from tinyflux.distributed.relay import errors_as_raised
from tinyflux.distributed.resume import first_weights
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.inference.sampler import Sampler, decode
from tinyflux.model.adapters import ADAPTER_WEIGHTS, is_adapter
from tinyflux.model.files import WEIGHTS_NAME
from tinyflux.model.loader import load_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.report.results import pass_on_figures
from tinyflux.run_dir import EVALUATION, EVALUATION_PICTURES, FINAL
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.validation import validate
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.device import resolve_device
from tinyflux.util.files import atomic_write
from tinyflux.util.images import png_bytes
from tinyflux.util.logging import log_to_console
from tinyflux.util.machine import describe_machine
from tinyflux.util.urls import join

PROMPTS = 64

logger = logging.getLogger(__name__)


def nearest_share(pictures: Tensor, references: Tensor) -> dict[str, float]:
    """How often picture i ``[N, 3, H, W]`` is nearest to reference i, by squared pixel error.

    Returns:
        ``top1``, and ``top5``: its reference is among the five nearest.
    """
    distances = torch.cdist(pictures.flatten(1), references.flatten(1))
    own = distances.diagonal()[:, None]
    closer = (distances < own).sum(1)
    return {
        "top1": (closer < 1).float().mean().item(),
        "top5": (closer < 5).float().mean().item(),
    }


def evaluate(run: RunConfig) -> str:
    """Write ``evaluation.json`` and the pictures it speaks of, as a task of Ray's; its place.

    Raises:
        TinyFluxError: there is no finished run, or no cache.
    """
    ensure_ray()
    import ray

    workers = run.workers
    task = ray.remote(_evaluate).options(
        num_cpus=workers.cpus_per_worker, num_gpus=1 if workers.use_gpu else 0
    )
    with errors_as_raised():
        ray.get(task.remote(to_dict(run)))
    if run.evaluate.extractors and (run.evaluate.sets or run.evaluate.cache_sets):
        _measure(run)
    return join(run.run_dir, EVALUATION)


def _measure(run: RunConfig) -> None:
    """Add what the extractors say to ``evaluation.json``, under ``measured``."""
    checkpoint = run.evaluate.checkpoint or join(run.run_dir, FINAL)
    measured = measure(
        run.evaluate,
        replace(run.sample, checkpoint=checkpoint),
        run.zoo,
        run.mix[0].path if run.mix else run.cache.path,
        run.trainer.val_fraction,
        run.run_dir,
    )
    folder = open_folder(run.run_dir)
    record = {**json.loads(folder.read(EVALUATION)), "measured": to_dict(measured)}
    folder.write(EVALUATION, (json.dumps(record, indent=2) + "\n").encode())
    if run.evaluate.checkpoint is None:
        pass_on_figures(run, measured)


def _evaluate(packed: dict[str, Any]) -> None:
    log_to_console()
    run = from_dict(RunConfig, packed, "the run")
    with working_copy(run.run_dir) as run_dir:
        _evaluate_in(run_dir, run)


def _weights_digest(final: Path) -> str:
    name = ADAPTER_WEIGHTS if is_adapter(final) else WEIGHTS_NAME
    return hashlib.sha256((final / name).read_bytes()).hexdigest()


def _evaluate_in(run_dir: Path, run: RunConfig) -> None:
    device = resolve_device(run.zoo.device)
    trained = load_model(run_dir / FINAL, device=str(device), dtype=torch.float32)
    untrained = first_weights(TrainingJob.of(run), device).eval()
    if untrained.sol_units is not None and trained.sol_units is not None:
        untrained.sol_units.load_state_dict(trained.sol_units.state_dict())
    models = {"untrained": untrained, "trained": trained}
    data = CacheMixture(list(run.mix) or [MixSource(run.cache.path)])
    held_out_rows = data.held_out(run.trainer.val_fraction)
    record = {
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "weights": _weights_digest(run_dir / FINAL),
        "machine": describe_machine(),
        "nearest": _draw(
            run_dir, run, models, data.caches[0], ~held_out_rows[: len(data.caches[0])]
        ),
    }
    if held_out_rows.any():
        held_out = read_held_out(data, held_out_rows)
        losses = {
            name: validate(model, held_out, run.trainer, data.t_buckets)
            for name, model in models.items()
        }
        record["held_out"] = {"count": int(held_out_rows.sum()), **losses}
        logger.info(
            "held-out velocity loss: %.4f, untrained %.4f",
            losses["trained"]["val_velocity"],
            losses["untrained"]["val_velocity"],
        )
    text = json.dumps(record, indent=2) + "\n"
    atomic_write(run_dir / EVALUATION, text.encode())


def _draw(
    run_dir: Path,
    run: RunConfig,
    models: dict[str, TinyFluxDeep],
    data: CachedDataset,
    trained_on: np.ndarray,
) -> dict[str, Any]:
    """Pictures for captions of the training data, and how many are nearest to their own picture.

    The data's pictures are its latents, decoded; those of its most frequent size are taken. Of
    several caches the first is drawn from.
    """
    (height, width), rows = max(_sizes(data, trained_on).items(), key=lambda item: len(item[1]))
    step = max(1, len(rows) // PROMPTS)
    chosen = rows[::step][:PROMPTS]
    captions = data.captions()
    prompts = [captions[row] for row in chosen]
    zoo = run.zoo.build(run.model)
    shift = run.model.latent_shift
    references = decode(zoo, data.read(chosen)["latents"], shift).cpu()
    drawn = {
        name: _drawn(run, zoo, model, prompts, (height, width)) for name, model in models.items()
    }
    shares = {name: nearest_share(images, references) for name, images in drawn.items()}
    for name, share in shares.items():
        logger.info(
            f"{name}: {share['top1']:.0%} of {len(prompts)} pictures are nearest to their "
            f"own caption's picture, {share['top5']:.0%} among the five nearest"
        )
    output = run_dir / EVALUATION_PICTURES
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    shown = zip(prompts, drawn["trained"], references, strict=True)
    for index, (prompt, image, wanted) in enumerate(shown):
        names = {"picture": f"{index:03d}.png", "reference": f"{index:03d}.data.png"}
        atomic_write(output / names["picture"], png_bytes(image))
        atomic_write(output / names["reference"], png_bytes(wanted))
        pictures.append({"prompt": prompt, **names})
    return {"count": len(prompts), **shares, "pictures": pictures}


def _drawn(
    run: RunConfig,
    zoo: ModelZoo,
    model: TinyFluxDeep,
    prompts: list[str],
    grid: tuple[int, int],
) -> Tensor:
    """Pictures of the prompts as ``run.sample`` says, ``grid`` latents high and wide."""
    device = next(model.parameters()).device
    sampler = Sampler(zoo, model, device=device, dtype=torch.float32)
    return sampler.generate(
        prompts,
        num_steps=run.sample.num_steps,
        guidance_scale=run.sample.guidance_scale,
        height=grid[0],
        width=grid[1],
        seed=run.sample.seed,
        negative_prompt=run.sample.negative_prompt,
    ).cpu()


def _sizes(data: CachedDataset, chosen: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Chosen rows by their latents' ``(h, w)``."""
    found: dict[tuple[int, int], list[int]] = {}
    for size, rows in data.grids():
        here = [row for row in rows if chosen[row]]
        if here:
            found.setdefault(size, []).extend(here)
    return found
