"""Power-function averages are what the formula says, and mixtures of them reach other lengths."""

import math

import pytest
import torch
from torch import nn

from tests.fixtures.trainers import make_trainer, weights
from tinyflux.cli.main import run_job
from tinyflux.distributed.mix_ema import write_mixed_ema
from tinyflux.errors import CheckpointError, ConfigError, DamagedCheckpointError
from tinyflux.model.loader import load_model
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.config_checks import LONGEST_EMA
from tinyflux.trainer.mix_ema import mix_ema
from tinyflux.trainer.power_ema import PowerEMA, Profile, exponent, mixture, power_decay
from tinyflux.trainer.sharding import part

LENGTHS = [0.05, 0.1]


def shares(length, steps):
    """``[steps]``: how much the weights after each step count, by the profile's own integral."""
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    return (edges ** (exponent(length) + 1)).diff()


def test_lengths_are_those_of_the_paper():
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.1) == pytest.approx(6.94, abs=5e-3)
    assert exponent(LONGEST_EMA - 1e-9) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_a_profile_is_as_wide_as_its_length_says(length):
    times = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = shares(length, 100_000)
    mean = (times * counts).sum()
    assert math.sqrt(((times - mean).square() * counts).sum()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("other", [Profile(0.05, 30.0), Profile(0.1, 70.0), Profile(0.2, 100.0)])
def test_inner_products_are_the_integrals(other):
    one, cells = Profile(0.1, 70.0), 200_000
    tau = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 100

    def values(profile):
        g = exponent(profile.length)
        inside = (g + 1) * tau**g / profile.step ** (g + 1)
        return torch.where(tau < profile.step, inside, 0.0)

    numeric = float((values(one) * values(other)).mean() * 100)
    assert one.inner(other) == pytest.approx(numeric, rel=1e-3)
    assert one.inner(other) == pytest.approx(other.inner(one))


def walk(steps, size=7, seed=0):
    """``[steps, size]`` weights after each step of a random walk."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(steps, size, generator=source).cumsum(0)


def test_a_track_is_the_weighted_mean_of_all_weights_and_of_no_first_ones():
    model = nn.Linear(7, 1, bias=False)
    ema = PowerEMA(model, LENGTHS)
    path = walk(60)
    for step, values in enumerate(path, start=1):
        with torch.no_grad():
            model.weight.copy_(values[None])
        ema.update(model, step)
    for length in LENGTHS:
        mean = (shares(length, 60)[:, None] * path).sum(0)
        torch.testing.assert_close(
            ema.tracks[length].shadow["weight"][0].double(), mean, rtol=1e-5, atol=1e-5
        )
    assert power_decay(0.1, 1) == 0


@pytest.mark.parametrize("world", [2, 3])
def test_parts_are_averaged_like_the_whole(world):
    path = walk(20)
    whole = PowerEMA({"w": path[0]}, LENGTHS)
    parts = [PowerEMA({"w": part(path[0], rank, world)}, LENGTHS) for rank in range(world)]
    for step, values in enumerate(path, start=1):
        whole.update({"w": values}, step)
        for rank, ema in enumerate(parts):
            ema.update({"w": part(values, rank, world)}, step)
    for length in LENGTHS:
        together = torch.cat([ema.tracks[length].shadow["w"] for ema in parts])
        assert torch.equal(together, whole.tracks[length].shadow["w"])


def test_mixtures_add_up_to_one_are_exact_at_what_is_kept_and_better_with_more():
    errors = []
    for count in (1, 4, 16):
        steps = [1000 * (index + 1) / count for index in range(count)]
        kept = [Profile(length, step) for step in steps for length in LENGTHS]
        assert mixture(kept, Profile(0.1, 1000)).error < 1e-6
        found = mixture(kept, Profile(0.15, 1000))
        assert sum(found.weights) == pytest.approx(1)
        errors.append(found.error)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with a checkpoint every third step, and its weights after each step."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        root, total_steps=24, save_every_steps=3, keep_last_n_steps=99, ema_lengths=LENGTHS,
        learning_rate=1e-2, lr_scheduler="constant",
    )  # fmt: skip
    path = []

    def data():
        for item in trainer.steps(99):
            if trainer.current_step:
                path.append(weights(trainer))
            yield item

    trainer.loop.run(data(), ahead=False)
    path.append(weights(trainer))
    return root, torch.stack(path)


def checkpoints_of(root):
    return sorted((root / "checkpoints").iterdir())


@pytest.mark.parametrize("length", [0.05, 0.07, 0.1, 0.13])
def test_a_mixture_is_the_average_of_the_weights_that_were_stored(run, length):
    root, path = run
    mixed = mix_ema(checkpoints_of(root), length)
    assert mixed.step == len(path) == 24
    brute = (shares(length, 24)[:, None] * path).sum(0)
    names = dict(load_model(checkpoints_of(root)[-1], device="cpu").named_parameters())
    found = torch.cat([mixed.tensors[name].flatten() for name in names])
    # Beside the profile's error, which is told, there are whole steps instead of an integral.
    moved = (brute - path.double().mean(0)).norm()
    assert (found - brute).norm() / moved < mixed.mixture.error + 0.02


def test_the_command_writes_a_model_and_refuses_what_it_cannot(run, tmp_path, capsys):
    root, _ = run
    arguments = [str(root), "0.08", str(tmp_path / "mixed")]
    assert run_job("ema", arguments) == 0
    expected = mix_ema(checkpoints_of(root), 0.08).tensors
    model = load_model(str(tmp_path / "mixed"), device="cpu", dtype=torch.float32)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in model.state_dict().items())
    assert run_job("ema", arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"0\.25 is out of reach.*of lengths 0\.05, 0\.1 in"):
        mix_ema(checkpoints_of(root)[-1:], 0.25)
    with pytest.raises(ConfigError, match=r"below 0\.2887"):
        write_mixed_ema(str(root), 0.3, tmp_path / "other")
    with pytest.raises(CheckpointError, match="there are no checkpoints"):
        write_mixed_ema(str(tmp_path), 0.08, tmp_path / "other")


def test_a_run_goes_on_with_its_averages_bit_for_bit_or_not_at_all(run, tmp_path):
    root, _ = run
    changes = {"learning_rate": 1e-2, "lr_scheduler": "constant", "total_steps": 24}
    resumed = make_trainer(tmp_path, ema_lengths=LENGTHS, **changes)
    resumed.load_checkpoint(str(root / "checkpoints" / "step_00000021"))
    resumed.train(99)
    resumed.save_checkpoint(str(tmp_path / "again"))
    names = ["ema_0.05.safetensors", "ema_0.1.safetensors"]
    for name in names:
        there = root / "checkpoints" / "step_00000024" / name
        assert (tmp_path / "again" / name).read_bytes() == there.read_bytes()
    other = make_trainer(tmp_path / "b", ema_lengths=[0.05, 0.2], **changes)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"keeps no power-function EMA of length 0\.2"):
        other.load_checkpoint(str(tmp_path / "again"))
    assert torch.equal(weights(other), before)
    damaged = tmp_path / "again" / names[0]
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\x7f")
    with pytest.raises(DamagedCheckpointError, match=r"ema_0\.05\.safetensors is not as it was"):
        mix_ema([tmp_path / "again"], 0.08)
    plain = make_trainer(tmp_path / "c", total_steps=1, save_every_steps=1)
    plain.train()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints keeps a power-function"):
        mix_ema(checkpoints_of(tmp_path / "c"), 0.08)


@pytest.mark.parametrize("lengths", [[0.0], [0.3], [0.1, 0.1]])
def test_lengths_that_mean_nothing_are_refused(lengths):
    with pytest.raises(ConfigError, match=r"ema_lengths must be different numbers above 0"):
        TrainerConfig(ema_lengths=lengths)
