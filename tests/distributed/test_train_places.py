"""What a run on Ray refuses before anything is started."""

import multiprocessing

import pytest

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.cli.main import run_job
from tinyflux.config import RunConfig, keep_run_config, save_run_config
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.deepspeed import check_zero
from tinyflux.distributed.resume import check_same_stream, find_checkpoint
from tinyflux.distributed.run_lock import claimed
from tinyflux.distributed.start import check_places
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import CheckpointError, ConfigError, TrainingError
from tinyflux.model.config import ZooConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.trainer.checkpoint import CheckpointData, save_checkpoint
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig


def job_at(run_dir):
    return TrainingJob(
        str(run_dir), [], preset("toy"), TrainerConfig(), WorkersConfig(), ZooConfig(), "one"
    )


@pytest.mark.parametrize("stage", range(4))
def test_muon_is_refused_under_every_zero_stage(stage):
    with pytest.raises(ConfigError, match="'muon' does not run under DeepSpeed, which shards flat"):
        check_zero(TrainerConfig(optimizer="muon"), stage)


@pytest.mark.parametrize("name", ["checkpoint_dir", "tensorboard_dir", "sample_dir"])
def test_places_that_a_run_does_not_write_to_are_refused(name):
    check_places(TrainerConfig(), "runs/a")
    with pytest.raises(ConfigError, match=rf"trainer\.{name} is for the library's Trainer"):
        check_places(TrainerConfig(**{name: "elsewhere"}), "runs/a")


class Sizes:
    def __init__(self, count):
        self._count = count

    def sizes(self):
        return self._count


def test_another_batch_size_is_refused_where_pictures_have_several_sizes():
    state = TrainerState(step=3, trainer={"batch_size": 8})
    config = TrainerConfig(batch_size=4)
    check_same_stream(state, config, Sizes(1), "runs/a")
    check_same_stream(state, TrainerConfig(batch_size=8), Sizes(2), "runs/a")
    with pytest.raises(ConfigError, match="batch_size = 8, not 4, and its pictures are of 2 sizes"):
        check_same_stream(state, config, Sizes(2), "runs/a")
    with pytest.raises(ConfigError, match=r"trainer\.seed = 0, not 1"):
        check_same_stream(TrainerState(), TrainerConfig(seed=1), Sizes(1), "runs/a")


def hold(run_dir, held, let_go):
    with claimed(str(run_dir)):
        held.set()
        let_go.wait()


def test_one_training_at_a_time_writes_to_a_run_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, let_go))
    other.start()
    assert held.wait(300)
    with (
        pytest.raises(TrainingError, match=rf"is being trained by process {other.pid} on "),
        claimed(str(tmp_path)),
    ):
        pass
    other.kill()  # a lock does not outlive its holder
    other.join()
    with claimed(str(tmp_path)):
        pass


def checkpoint_at(root, step, damaged=False):
    """A checkpoint of a small student at ``step``."""
    model = TinyFluxDeep(student_config())
    weights = model.state_dict()
    path = root / "checkpoints" / f"step_{step:08d}"
    save_checkpoint(path, CheckpointData(model, weights, weights, 0.9, {}, TrainerState(step=step)))
    if damaged:
        (path / "ema.safetensors").write_bytes(b"cut off")


def places(kind, folder):
    """A run's directory, and where it is written: there, or at a URL."""
    return (str(folder), folder) if kind == "disk" else (f"file://{folder}", folder)


@pytest.mark.parametrize("kind", ["disk", "url"])
def test_the_newest_whole_checkpoint_is_named_and_damaged_ones_alone_end_the_run(
    tmp_path, monkeypatch, caplog, kind
):
    monkeypatch.setenv("TINYFLUX_LOCAL_DIR", str(tmp_path / "local"))
    run_dir, folder = places(kind, tmp_path / "run")
    folder.mkdir()
    assert find_checkpoint(job_at(run_dir)) is None
    checkpoint_at(folder, 8, damaged=True)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is whole"):
        find_checkpoint(job_at(run_dir))
    checkpoint_at(folder, 4)
    caplog.clear()
    found = find_checkpoint(job_at(run_dir))
    assert found.name == "step_00000004"
    assert found.checkpoint.state.step == 4
    assert [record.message.count("ema.safetensors is not as") for record in caplog.records] == [1]


def test_a_training_that_is_refused_leaves_the_others_config_alone(tmp_path, monkeypatch, capsys):
    run = RunConfig(run_dir=str(tmp_path / "run"), cache=CacheConfig(path=str(tmp_path / "cache")))
    run.model, run.zoo = student_config(), zoo_config(make_world(tmp_path / "world"))
    run.data = DataConfig(str(write_pictures(tmp_path / "pictures")), height=16, width=16)
    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    build(configs, LocalRunner(configs))
    run.workers = WorkersConfig(engine="torch")
    save_run_config(run, tmp_path / "run.yaml")
    with claimed(run.run_dir):
        assert run_job("train", ["--config", str(tmp_path / "run.yaml")]) == 2
    assert "is being trained by process" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_directory_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="file/run cannot be written"),
        claimed(str(tmp_path / "file" / "run")),
    ):
        pass
    with pytest.raises(ConfigError, match="file/run' cannot be written"):
        keep_run_config(RunConfig(run_dir=str(tmp_path / "file" / "run")))
