"""The demo: the toy's pictures and world, then a run as any other, with a server at its end."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tinyflux import run_dir as names
from tinyflux.config import RunConfig, load_run_config
from tinyflux.errors import ConfigError
from tinyflux.report.stages import QUIET, Stage, StageFailed, main_stages, run_stages
from tinyflux.util.files import atomic_write
from tinyflux.util.processes import child_process

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path("configs/demo.yaml")
# It is a pair that nobody showed the student.
SERVE_PROMPT = "watermelon, Twemoji style"
HEALTHY_SECONDS = 180

logger = logging.getLogger(__name__)


def stages(run: RunConfig) -> list[Stage]:
    """The demo's stages in order."""
    config = ["--config", str(CONFIG)]
    main = main_stages(config)
    pictures = Path(run.data.folder).parent  # beside the train split stand the others
    return [
        Stage(
            "icons",
            "write things in five art styles as Parquet, some kept from training",
            ["-m", "tinyflux", "toy", "icons", str(pictures), "--demo", f"--size={run.data.width}"],
        ),
        Stage(
            "world",
            "unpack the toy world (VAE, T5, CLIP, Lune, Sol), trained beforehand on emoji",
            ["-m", "tinyflux", "toy", "world", run.zoo.vae_repo],
        ),
        main["cache"],
        main["train"],
        Stage(
            "sample",
            "draw pictures from the EMA weights",
            ["-m", "tinyflux", "sample", *config],
        ),
        Stage(
            "serve",
            "start Ray Serve, ask for a picture over HTTP, stop it",
            ["-m", "tinyflux", "serve", *config],
            run=lambda stage: _serve_and_ask(stage, run),
        ),
        main["evaluate"],
        main["report"],
    ]


def run_demo(fresh: bool) -> Path:
    """Run every stage that has not run yet.

    Args:
        fresh: remove what an earlier demo left and start over.

    Returns:
        The report's path.

    Raises:
        StageFailed: a stage's command failed; what went wrong has been printed by it.
    """
    if not (ROOT / "ray_jobs").is_dir():
        raise ConfigError(
            "the demo runs from a checkout of TinyFlux: clone it and type `make demo`"
        )
    run = load_run_config(ROOT / CONFIG)
    run_dir = Path(run.run_dir)
    if fresh and run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    run_stages(stages(run), run, ROOT)
    logger.info(f"\nThe demo took {time.monotonic() - started:.0f} s. The report:")
    return run_dir / names.REPORT


def _serve_and_ask(stage: Stage, run: RunConfig) -> None:
    """Start the server, wait until it is healthy, keep the picture it answers with, stop it."""
    address = f"http://{run.serve.host}:{run.serve.port}"
    command = [sys.executable, *stage.command]
    with child_process(command, ROOT, {**os.environ, **QUIET}) as server:
        _wait_until_healthy(server, address)
        picture, seconds = _ask(address, run)
    atomic_write(Path(run.run_dir) / names.SERVED_PICTURE, picture)
    served = {"prompt": SERVE_PROMPT, "seconds": round(seconds, 2)}
    atomic_write(Path(run.run_dir) / names.SERVED, json.dumps(served).encode())


def _wait_until_healthy(server: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + HEALTHY_SECONDS
    while not _is_healthy(address):
        if server.poll() is not None:
            raise StageFailed(f"the server ended with exit code {server.returncode}, see above")
        if time.monotonic() > deadline:
            raise StageFailed(f"the server at {address} was not healthy within {HEALTHY_SECONDS} s")
        time.sleep(0.5)


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _ask(address: str, run: RunConfig) -> tuple[bytes, float]:
    """A picture of :data:`SERVE_PROMPT` as PNG, and the seconds that it took."""
    asked = time.monotonic()
    answer = httpx.post(
        f"{address}/generate",
        json={
            "prompt": SERVE_PROMPT,
            "seed": run.sample.seed,
            "num_steps": run.sample.num_steps,
            "guidance_scale": run.sample.guidance_scale,
            "negative_prompt": run.sample.negative_prompt,
            "width": run.data.width,
            "height": run.data.height,
        },
        timeout=120,
    )
    seconds = time.monotonic() - asked
    if answer.status_code != httpx.codes.OK:
        raise StageFailed(f"the server answered {answer.status_code}: {answer.text:.300}")
    logger.info(f"asked {address}/generate for '{SERVE_PROMPT}': a picture in {seconds:.2f} s")
    return answer.content, seconds
