"""What a run on Ray refuses before anything is started."""

import multiprocessing

import pytest

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

from tinyflux.config import RunConfig, keep_run_config
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.train import _Job, check_places, check_same_stream, claimed
from tinyflux.errors import ConfigError, TrainingError
from tinyflux.model.config import ZooConfig, preset
from tinyflux.trainer.checkpoint import TrainerState
from tinyflux.trainer.config import TrainerConfig


def job_at(run_dir):
    return _Job(
        str(run_dir), [], preset("toy"), TrainerConfig(), WorkersConfig(), ZooConfig(), "one"
    )


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
    with claimed(job_at(run_dir)):
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
        claimed(job_at(tmp_path)),
    ):
        pass
    other.kill()  # a lock does not outlive its holder
    other.join()
    with claimed(job_at(tmp_path)):
        pass


def test_a_run_directory_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="file/run cannot be written"),
        claimed(job_at(tmp_path / "file" / "run")),
    ):
        pass
    with pytest.raises(ConfigError, match="file/run' cannot be written"):
        keep_run_config(RunConfig(run_dir=str(tmp_path / "file" / "run")))
