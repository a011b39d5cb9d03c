import json

import pytest
import torch
from PIL import Image

from tests.fixtures.fake_zoo import FakeZoo
from tests.fixtures.students import student
from tinyflux.errors import InputError
from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.inference.sampler import Sampler, sample_grid
from tinyflux.trainer.ema import EMA
from tinyflux.util.images import image_grid


@pytest.fixture
def sampler():
    return Sampler(FakeZoo(), student().eval(), device="cpu", dtype=torch.float32)


def test_time_runs_from_noise_to_data():
    times = sample_grid(10, 3.0)
    assert times.shape == (11,)
    assert times[0] == 0
    assert times[-1] == 1
    assert (times.diff() > 0).all()


def test_guidance_blends_the_two_velocities():
    model = student().eval()
    zoo, x, t = FakeZoo(), torch.randn(2, 4, 3, 5), torch.tensor([0.2, 0.7])
    cond = TextCondition(*zoo.encode_prompts_batched(["a cat", "dogs"]))
    uncond = TextCondition(*zoo.encode_prompts_batched(["", ""], allow_empty=True))
    with torch.no_grad():
        plain = guided_velocity(model, x, t, cond, None, 1.0)
        null = guided_velocity(model, x, t, uncond, None, 1.0)
        guided = guided_velocity(model, x, t, cond, uncond, 3.0)
        mixed = guided_velocity(model, x, t, cond, uncond, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], guided[1], rtol=1e-4, atol=1e-5)


def test_only_the_first_samples_of_a_batch_need_be_guided():
    model = student().eval()
    zoo, x, t = FakeZoo(), torch.randn(3, 4, 3, 5), torch.tensor([0.2, 0.7, 0.4])
    cond = TextCondition(*zoo.encode_prompts_batched(["a cat", "dogs", "a cup"]))
    uncond = TextCondition(*zoo.encode_prompts_batched(["", "blurry"], allow_empty=True))
    rows = []

    def watched(inputs, *args, **kwargs):
        rows.append(inputs.shape[0])
        return model(inputs, *args, **kwargs)

    with torch.no_grad():
        some = guided_velocity(watched, x, t, cond, uncond, torch.tensor([2.0, 3.0]))
        third = TextCondition(cond.t5[2:], cond.pooled[2:])
        plain = guided_velocity(model, x[2:], t[2:], third, None, 1.0)
        second = TextCondition(cond.t5[1:2], cond.pooled[1:2])
        negative = TextCondition(uncond.t5[1:], uncond.pooled[1:])
        guided = guided_velocity(model, x[1:2], t[1:2], second, negative, 3.0)
    assert rows == [5]
    torch.testing.assert_close(some[2:], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some[1:2], guided, rtol=1e-4, atol=1e-5)


def test_a_picture_depends_on_its_seed_and_prompt_only(sampler):
    settings = {"num_steps": 4, "height": 3, "width": 5}
    together = sampler.generate(["a cat", "a dog", "a cup"], seed=7, **settings)
    assert together.shape == (3, 3, 24, 40)
    assert 0 <= together.min() <= together.max() <= 1
    alone = sampler.generate(["a dog"], seed=8, **settings)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    listed = sampler.generate(["a cup", "a cat"], seed=[9, 7], **settings)
    torch.testing.assert_close(listed, together[[2, 0]], rtol=1e-4, atol=1e-5)
    other = sampler.generate(["a dog"], seed=9, **settings)
    assert not torch.equal(other, alone)


def test_guidance_of_one_never_reads_the_negative_prompt(sampler):
    sampler.generate(["a cat"], num_steps=1, guidance_scale=1.0, height=2, width=2, seed=0)
    assert sampler.zoo.encoded == ["a cat"]
    sampler.generate(["a cat"], num_steps=1, height=2, width=2, seed=0, negative_prompt="")
    assert sampler.zoo.encoded == ["a cat", "a cat", ""]


def test_ema_weights_are_used_and_the_models_own_come_back(sampler):
    model = sampler.model.train()
    settings = {"num_steps": 2, "height": 2, "width": 2, "seed": 0}
    raw = sampler.generate(["a cat"], **settings)
    sampler.ema = EMA(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(sampler.generate(["a cat"], **settings), raw)
    assert not torch.equal(sampler.generate(["a cat"], use_ema=False, **settings), raw)
    assert model.training

    def fail(step, num_steps, latents):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sampler.generate(["a cat"], callback=fail, **settings)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_every_step_is_seen(sampler, solver):
    seen = []
    sampler.generate(
        ["a cat"],
        num_steps=3,
        height=2,
        width=4,
        solver=solver,
        callback=lambda step, total, x: seen.append((step, total, tuple(x.shape))),
    )
    assert seen == [(step, 3, (1, 4, 2, 4)) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a cat", "  "]}, "prompt 1 is empty"),
        ({"prompts": "a cat"}, "must be a list"),
        ({"height": 0}, "height must be a whole number from 1"),
        ({"width": 10**6}, "width must be a whole number"),
        ({"num_steps": 0}, "num_steps must be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "a seed must be"),
        ({"solver": "rk4"}, "solver must be one of euler, heun, multistep, not 'rk4'"),
        ({"seed": [1, 2]}, "2 seeds do not fit 1 prompts"),
    ],
)
def test_absurd_requests_are_refused(sampler, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        sampler.generate(**{"prompts": ["a cat"], "height": 2, "width": 2, **changes})


def test_grids_are_written_with_their_prompts(sampler, tmp_path):
    images = torch.rand(5, 3, 8, 16)
    path = sampler.save_samples(images, list("abcde"), str(tmp_path / "out"), step=12)
    assert path == str(tmp_path / "out" / "step_00000012.png")
    with Image.open(path) as sheet:
        assert sheet.size == image_grid(images).size == (3 * 18 + 2, 2 * 10 + 2)
    record = json.loads((tmp_path / "out" / "step_00000012.json").read_text())
    assert record["prompts"] == list("abcde")
    with pytest.raises(InputError, match="5 images do not fit 1 prompts"):
        sampler.save_samples(images, ["a"], str(tmp_path))
