"""Every job through ``ray job submit``.

Slow: seven jobs, one after the other where each needs the one before; most of it is imports.
"""

import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.fixtures.ray_head import finish, succeed
from tests.fixtures.waiting import PATIENCE, answers, free_ports, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, zoo_config

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.config import SampleConfig, WorkersConfig
from tinyflux.serving.config import ServeConfig
from tinyflux.trainer.config import TrainerConfig

pytestmark = pytest.mark.slow


def picture_size(png):
    with Image.open(io.BytesIO(png)) as picture:
        return picture.size


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run; its file is at ``<run_dir>.yaml``."""
    root = tmp_path_factory.mktemp("jobs")
    make_world(root / "world")
    (root / "pictures").mkdir()
    for index in range(12):
        picture = root / "pictures" / f"{index:02d}.png"
        Image.new("RGB", (16, 16), (index * 20, 250 - index * 20, 99)).save(picture)
        picture.with_suffix(".txt").write_text(CAPTIONS[index % len(CAPTIONS)])
    run = RunConfig(
        run_dir=str(root / "run"),
        data=DataConfig(folder=str(root / "pictures"), height=16, width=16),
        zoo=zoo_config(root / "world"),
        cache=CacheConfig(path=str(root / "cache"), rows_per_shard=6),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=4, gradient_accumulation=1, total_steps=4, save_every_steps=2, log_every=1
        ),
        workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5),
        sample=SampleConfig(prompts=CAPTIONS[:2], num_steps=2, size=16),
        serve=ServeConfig(port=free_ports(1)[0], max_size=32, default_size=16),
    )
    save_run_config(run, f"{run.run_dir}.yaml")
    return run


def test_every_job_from_pictures_to_a_server(head, run):
    config = ("--config", f"{run.run_dir}.yaml")
    root = Path(run.run_dir)
    # Together, since most of a job's time is imports.
    here = head.start("-c", "import tinyflux; print(tinyflux.__file__)")
    mistaken = head.start("ray_jobs/train.py", *config, "--trainer.learning_rat", "1")
    succeed(head.start("ray_jobs/build_cache.py", *config))
    assert (Path(run.cache.path) / "manifest.json").exists()

    assert "working_dir_files" in succeed(here)
    status, output = finish(mistaken)
    assert status != 0
    assert "error: --trainer.learning_rat is not a setting (did you mean" in output
    assert "Traceback" not in output

    output = succeed(head.start("ray_jobs/train.py", *config))
    # Once: Ray Train shows what workers log, and so must nobody else.
    assert output.count("step 4/4  loss") == 1
    assert (root / "final" / "model.safetensors").exists()
    assert [path.name for path in sorted((root / "checkpoints").iterdir())] == [
        "step_00000002",
        "step_00000004",
    ]

    evaluated = head.start("ray_jobs/evaluate.py", *config)
    server = ("--no-wait", "--submission-id=server")
    succeed(head.start("ray_jobs/serve.py", *config, options=server))
    succeed(head.start("ray_jobs/sample.py", *config))
    assert picture_size((root / "drawn" / "00001.png").read_bytes()) == (16, 16)
    succeed(evaluated)
    assert (root / "evaluation.json").exists()

    address = f"http://127.0.0.1:{run.serve.port}"
    wait_for(lambda: answers(f"{address}/healthz"))
    body = {"prompt": "red circle", "num_steps": 2, "width": 24, "height": 16}
    answer = httpx.post(f"{address}/generate", json=body, timeout=PATIENCE)
    assert picture_size(answer.content) == (24, 16)
    assert "was stopped" in head.stop_job("server")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/healthz")
