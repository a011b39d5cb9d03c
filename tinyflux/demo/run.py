"""Runs the demo's stages one after another, each as the command that a user would type.

A stage that finished is not run again; one that was stopped continues, because every stage's own
command continues from what it finds.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tinyflux.config import RunConfig, load_run_config
from tinyflux.errors import ConfigError, TinyFluxError
from tinyflux.util.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
# Stages tell their progress themselves; no library's bars or requests between their lines.
QUIET = {"TQDM_DISABLE": "1", "RAY_SERVE_LOG_TO_STDERR": "0"}
CONFIG = Path("configs/demo.yaml")
SERVE_PROMPT = "red apple"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: its key in ``stages.json``.
        title: what it does, for people.
        command: arguments after ``python``; what the report says to type for this stage alone.
        run: does it; None means running ``command``.
    """

    name: str
    title: str
    command: list[str]
    run: Callable[["Stage"], None] | None = None

    @property
    def shell(self) -> str:
        """The command as typed in the root of a checkout."""
        return shlex.join([".venv/bin/python", *self.command])


class StageFailed(TinyFluxError):
    """A stage's command ended with an error, which it has printed itself."""


def stages(run: RunConfig) -> list[Stage]:
    """The demo's stages in order."""
    config = ["--config", str(CONFIG)]
    demo = ["-m", "tinyflux", "demo"]
    return [
        Stage(
            "pictures",
            "draw OpenMoji as a folder of captioned pictures",
            ["-m", "tinyflux", "toy", "pictures", run.data.folder, f"--size={run.data.width}"],
        ),
        Stage(
            "world",
            "unpack the toy world (VAE, T5, CLIP, Lune, Sol), trained beforehand on OpenMoji",
            ["-m", "tinyflux", "toy", "world", run.zoo.vae_repo],
        ),
        Stage(
            "cache",
            "encode pictures, captions and teacher features with Ray Data",
            ["ray_jobs/build_cache.py", *config],
        ),
        Stage(
            "train",
            "train the student with Ray Train and DeepSpeed",
            ["ray_jobs/train.py", *config],
        ),
        Stage(
            "sample",
            "draw pictures from the EMA weights",
            ["ray_jobs/sample.py", *config],
        ),
        Stage(
            "serve",
            "start Ray Serve, ask for a picture over HTTP, stop it",
            ["ray_jobs/serve.py", *config],
            run=lambda stage: _serve_and_ask(stage, run),
        ),
        Stage(
            "evaluate",
            "measure how well pictures follow prompts, against an untrained student",
            [*demo, "evaluate", *config],
        ),
        Stage("report", "write the report", [*demo, "report", *config]),
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

    record_path = run_dir / "stages.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    settings = hashlib.sha256((ROOT / CONFIG).read_bytes()).hexdigest()
    plan = stages(run)
    started = time.monotonic()
    redo = False
    for number, stage in enumerate(plan, start=1):
        done = record.get(stage.name)
        heading = f"[{number}/{len(plan)}] {stage.name}: {stage.title}"
        if done and done["settings"] == settings and not redo:
            print(f"{heading} - done before in {done['seconds']:.0f} s", flush=True)
            continue
        redo = True  # what follows was made from what this stage made
        print(f"\n{heading}\n$ {stage.shell}", flush=True)
        begun = time.monotonic()
        if stage.run is None:
            _call(stage)
        else:
            stage.run(stage)
        record[stage.name] = {
            "title": stage.title,
            "command": stage.shell,
            "seconds": round(time.monotonic() - begun, 1),
            "settings": settings,
        }
        atomic_write(record_path, (json.dumps(record, indent=2) + "\n").encode())
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. The report:", flush=True)
    return run_dir / "report.html"


def _call(stage: Stage) -> None:
    command = [sys.executable, *stage.command]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, check=False).returncode
    if code:
        raise StageFailed(
            f"the stage '{stage.name}' ended with exit code {code}, see above; "
            f"`make demo` continues from here"
        )


def _serve_and_ask(stage: Stage, run: RunConfig) -> None:
    """Start the server, wait until it is healthy, keep the picture it answers with, stop it."""
    address = f"http://{run.serve.host}:{run.serve.port}"
    server = subprocess.Popen(
        [sys.executable, *stage.command], cwd=ROOT, env={**os.environ, **QUIET}
    )
    try:
        deadline = time.monotonic() + 180
        while True:
            if server.poll() is not None:
                raise StageFailed(f"the server ended with exit code {server.returncode}, see above")
            if time.monotonic() > deadline:
                raise StageFailed(f"the server at {address} was not healthy within 180 s")
            try:
                if httpx.get(f"{address}/healthz", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
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
        if answer.status_code != 200:
            raise StageFailed(f"the server answered {answer.status_code}: {answer.text:.300}")
        atomic_write(Path(run.run_dir) / "served.png", answer.content)
        served = {"prompt": SERVE_PROMPT, "seconds": round(seconds, 2)}
        atomic_write(Path(run.run_dir) / "served.json", json.dumps(served).encode())
        print(f"asked {address}/generate for '{SERVE_PROMPT}': a picture in {seconds:.2f} s")
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
