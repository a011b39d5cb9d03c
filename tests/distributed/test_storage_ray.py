"""`tinyflux run`, with everything in a bucket and with everything on a disk.

Slow: two Rays, an S3 server and seven commands of the command line, each of which imports torch.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from PIL import Image
from safetensors.torch import load

from tests.fixtures import keeper
from tests.fixtures.ray_head import ROOT, running_cluster
from tests.fixtures.s3_server import BUCKET, s3_server
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.config import SampleConfig, WorkersConfig
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.storage.remote import RemoteFolder
from tinyflux.trainer.config import TrainerConfig

pytestmark = [pytest.mark.slow, pytest.mark.fault]
STEPS = 80


@pytest.fixture
def run(tmp_path):
    write_pictures(tmp_path / "pictures", [*CAPTIONS, *CAPTIONS])
    return RunConfig(
        run_dir=f"s3://{BUCKET}/run",
        data=DataConfig(folder=str(tmp_path / "pictures"), height=16, width=16),
        zoo=zoo_config(make_world(tmp_path / "world")),
        cache=CacheConfig(
            path=f"s3://{BUCKET}/cache", rows_per_shard=4, num_actors=2, cpus_per_actor=0.5
        ),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=4, gradient_accumulation=1, total_steps=STEPS, save_every_steps=10,
            keep_last_n_steps=2, log_every=10, val_fraction=0.2, validate_every=40,
        ),
        workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5),
        sample=SampleConfig(prompts=CAPTIONS[:3], num_steps=2, size=16),
    )  # fmt: skip


def test_a_run_in_a_bucket_survives_cut_wires_and_a_lost_machine(tmp_path, run, monkeypatch, head):
    """Beside ``head``: another Ray on the machine is none of the run's business."""
    local = tmp_path / "local"
    with s3_server(tmp_path / "s3.log") as s3, ExitStack() as stack:
        for name, value in s3.environment(local).items():
            monkeypatch.setenv(name, value)
        extra = {**s3.environment(local), "PYTHONPATH": str(ROOT)}
        ray = stack.enter_context(running_cluster(tmp_path / "ray.log", extra))
        save_run_config(run, tmp_path / "run.yaml")
        bucket = RemoteFolder(f"s3://{BUCKET}")

        def start(*command):
            return keeper.start(
                [sys.executable, "-m", "tinyflux", *command], env=ray.environment, cwd=tmp_path,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

        def checkpoints():
            marks = [path for path in bucket.list("run/checkpoints") if path.endswith("state.json")]
            # By their names: one may be pruned before it is read.
            return sorted(int(path.split("/")[2].removeprefix("step_")) for path in marks)

        first = start("run", "run.yaml")
        try:
            # While the cache is built, and again while the run is trained.
            wait_for(lambda: bucket.list("cache/receipts") or first.poll() is not None)
            s3.wire.cut()
            time.sleep(2)
            s3.wire.mend()
            wait_for(lambda: checkpoints() or first.poll() is not None)
            s3.wire.cut_after(50_000)
            wait_for(lambda: len(checkpoints()) > 1 or first.poll() is not None)
            assert first.poll() is None
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            said = first.communicate()[0]
        assert "[2/4] train" in said, said
        assert max(checkpoints()) < STEPS
        assert s3.wire.refused > 1
        wait_for(lambda: not ray.processes(b"RayTrainWorker"))
        shutil.rmtree(local)  # as another machine, which has nothing but the bucket

        second = start("run", "run.yaml")
        said = second.communicate(timeout=PATIENCE)[0]
        assert second.returncode == 0, said
        assert "continuing from" in said
        assert "Traceback" not in said, said
        assert checkpoints() == [STEPS - 10, STEPS]
        assert not list((local / "runs").rglob("*.safetensors"))
        assert json.loads(bucket.read("run/final/training.json"))["step"] == STEPS
        assert b"held-out velocity loss" in bucket.read("run/report.html")
        records = [json.loads(line) for line in bucket.read("run/metrics.jsonl").splitlines()]
        steps = [record["step"] for record in records if "loss" in record]
        assert steps == list(range(10, STEPS + 1, 10))

        drawn = start("sample", "--config", "run.yaml")
        said = drawn.communicate(timeout=PATIENCE)[0]
        assert drawn.returncode == 0, said
        for place in range(3):
            picture = bucket.read(f"run/drawn/{place:05d}.png")
            assert Image.open(io.BytesIO(picture)).size == (16, 16)
        engine = open_engine(ServeConfig(checkpoint=f"{run.run_dir}/final"), run.zoo)
        try:
            request = SampleRequest(
                prompt=CAPTIONS[0], negative_prompt="", num_steps=1, guidance_scale=1.0,
                height=16, width=16, seed=0,
            )  # fmt: skip
            assert engine.submit(request).result(timeout=PATIENCE) is not None
        finally:
            engine.close()

        # The same run on a disk, never disturbed.
        straight = replace(
            run, run_dir=str(tmp_path / "run"), cache=replace(run.cache, path=str(tmp_path / "c"))
        )
        save_run_config(straight, tmp_path / "straight.yaml")
        done = start("run", "straight.yaml")
        said = done.communicate(timeout=PATIENCE)[0]
        assert done.returncode == 0, said
        assert "held-out velocity loss" in (tmp_path / "run" / "report.html").read_text()
        again = start("run", "straight.yaml")
        said = again.communicate(timeout=PATIENCE)[0]
        assert again.returncode == 0
        assert said.count("done before") == 4
        found = load(bucket.read("run/final/model.safetensors"))
        expected = load((tmp_path / "run" / "final" / "model.safetensors").read_bytes())
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in found)

        secret = s3.environment(local)["AWS_SECRET_ACCESS_KEY"].encode()
        assert not [path for path in bucket.list() if secret in bucket.read(path)]
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if secret in path.read_bytes()]
