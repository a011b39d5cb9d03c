"""Nothing in a training step waits for the device: what does is done before, or at a report."""

import pytest
import torch

from tests.fixtures.host_reads import host_reads
from tests.fixtures.students import make_batch, student
from tests.fixtures.trainers import NULL_TEXT, make_trainer, settings
from tinyflux.data.batches import StepData
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.align_config import AlignConfig
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.draws import Conditions
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.feed import Feed
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.step import training_loss
from tinyflux.util.buckets import default_buckets
from tinyflux.util.philox import key_of, normal_at


def reads_of_run(directory, steps):
    """What is read in a run that reports once, at its end."""
    trainer = make_trainer(directory, total_steps=steps, log_every=100, max_nonfinite_steps=2)
    with host_reads() as found:
        trainer.train(epochs=100)
    assert trainer.current_step == steps
    return found


def test_steps_between_two_reports_read_nothing(tmp_path):
    few, many = reads_of_run(tmp_path / "few", 2), reads_of_run(tmp_path / "many", 9)
    assert few == many
    assert few["tolist"] == 3  # what was recorded before the first step, and the report's two


@pytest.mark.parametrize("ahead", [True, False])
def test_a_micro_batch_made_ready_ahead_copies_nothing(tmp_path, ahead):
    """The meta device stands for another one: no tensor on it can be read at all."""
    config = settings(tmp_path, text_dropout=0.3, use_spatial_weighting=True)
    model, batch = student(sol_standardize=True).to("meta"), make_batch()
    null = tuple(tensor.to("meta") for tensor in NULL_TEXT)
    conditions = Conditions.of(batch, config).map(lambda tensor: tensor.to("meta"))
    there = batch.to("meta")
    with host_reads() as found:
        loss = training_loss(
            model, there, config, 10, null, default_buckets(torch.device("meta")),
            conditions=conditions if ahead else None,
        )  # fmt: skip
        loss.total.backward()
    # Times, noise, dropped captions, each teacher's, and the dropout layers' seeds.
    assert found == ({} if ahead else {"copy to meta": 6, "tolist": 1})


def test_noise_by_counter_is_made_on_the_device_and_reads_nothing(tmp_path):
    config = settings(tmp_path, noise_generator="philox")
    batch, device = make_batch(), torch.device("meta")
    conditions = Conditions.of(batch, config, device)
    assert conditions.noise.device == device
    assert conditions.t.device == torch.device("cpu")
    places = batch.positions.to(device)
    with host_reads() as found:
        noise = normal_at(key_of(config.seed, "noise"), places, 64)
    assert found == {}
    assert noise.device == device


@pytest.mark.parametrize("generator", ["torch", "philox"])
def test_what_is_made_ready_ahead_is_what_is_made_at_once(tmp_path, generator):
    control = AlignConfig("latents", 1, shuffle=True)
    config = settings(tmp_path, text_dropout=0.3, align=[control], noise_generator=generator)
    feed = Feed(torch.device("cpu"), config)
    data = [StepData([make_batch(seed=seed)[:5]], seed, 0, 0, 5) for seed in range(6)]
    ahead = list(feed.steps(iter(data)))
    assert [step.data.samples_seen for step in ahead] == list(range(6))
    for step, item in zip(ahead, data, strict=True):
        there, here = step.conditions[0], feed.ready(item).conditions[0]
        for name, tensor in vars(here).items():
            assert torch.equal(tensor, getattr(there, name))
        assert torch.equal(step.data.micro_batches[0].latents, item.micro_batches[0].latents)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path):
    device = torch.device("cuda")
    config = settings(tmp_path, text_dropout=0.3, dtype=torch.bfloat16)
    engine = TorchEngine(TinyFluxDeep(student().config).to(device), config)
    ema = EMA(engine.shard(), config.ema_decay)
    loop = TrainLoop(engine, config, TrainerState(), ema, NULL_TEXT, default_buckets())
    data = StepData([make_batch(), make_batch(seed=2)], 24, 0, 0, 24)
    loop.step(data)  # makes the optimizer's state
    try:
        torch.cuda.set_sync_debug_mode("error")
        loop.step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
