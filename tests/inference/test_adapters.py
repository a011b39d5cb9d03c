"""Adapters by request: rows of one batch that do not change one another."""

import pytest
import torch

from tests.fixtures.requests import request
from tests.fixtures.students import inputs, opened, student, write_adapter
from tests.fixtures.worlds import make_world, student_config, zoo_config
from tinyflux.errors import CheckpointError, ConfigError, InputError
from tinyflux.inference.adapters import drawn_with
from tinyflux.inference.sampler import Sampler
from tinyflux.model.adapters import named_adapters, read_adapter
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.serving.app import served_models
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine

STEP = 4  # the toy VAE's downscale


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A world, a student in it, and two adapters of different layers, ranks and scales."""
    folder = tmp_path_factory.mktemp("adapters")
    make_world(folder / "world")
    torch.manual_seed(0)
    model = TinyFluxDeep(student_config(timestep_shift=2.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    base = save_model(model, folder / "model")
    write_adapter(base, folder / "ink", 1)
    write_adapter(base, folder / "clay", 2, rank=2, target_modules=["qkv", "fc1"])
    write_adapter(base, folder / "dora", 3, kind="dora")
    return folder


def adapters(place):
    # A name that peft's own dictionary could not take, and one that is peft's default.
    return {"keys": str(place / "ink"), "default": str(place / "clay")}


@torch.no_grad()
def test_each_row_is_what_its_adapter_alone_gives(tmp_path):
    base = save_model(student(), tmp_path / "base")
    places = {name: write_adapter(base, tmp_path / name, seed) for seed, name in enumerate("ab")}
    rows = ["a", None, "b", "a"]
    values = inputs(size=len(rows))
    model = opened(base, places)
    assert named_adapters(model) == ["a", "b"]
    with drawn_with(model, rows):
        together = model(**values)
    for row, name in enumerate(rows):
        alone = opened(base, places[name] if name else None)
        expected = alone(**values)[row]
        torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=1e-5)
        if name is None:
            assert torch.equal(together[row], expected)
    # And the student is what it was.
    with drawn_with(model, [None] * len(rows)):
        assert torch.equal(model(**values), opened(base)(**values))


def test_requests_with_different_adapters_share_a_batch(place):
    asked = [
        request(prompt=prompt, seed=seed, adapter=name, guidance_scale=guidance)
        for seed, (prompt, name, guidance) in enumerate([
            ("red circle", "keys", 3.0), ("red circle", None, 1.0), ("blue square", "default", 3.0),
            ("blue square", "keys", 1.0), ("green heart", None, 3.0),
        ])
    ]  # fmt: skip
    config = ServeConfig(
        checkpoint=str(place / "model"), adapters=adapters(place), max_batch=len(asked),
        max_size=32, default_size=16,
    )  # fmt: skip
    zoo = zoo_config(place / "world")
    engine = open_engine(config, zoo)
    try:
        drawn = [one.result(60) for one in [engine.submit(one) for one in asked]]
        with pytest.raises(InputError, match="no adapter 'oil': keys, default"):
            engine.submit(request(adapter="oil"))
        with pytest.raises(CheckpointError, match="has other adapters"):
            engine.swap(opened(place / "model"))
    finally:
        engine.close(drain=False)
    plain = {}
    for one, image in zip(asked, drawn, strict=True):
        chosen = adapters(place)[one.adapter] if one.adapter else None
        model = opened(place / "model", chosen)
        sampler = Sampler(zoo.build(model.config), model, None, "cpu", zoo.dtype)
        expected = sampler.generate(
            [one.prompt], one.num_steps, one.guidance_scale, one.height // STEP,
            one.width // STEP, seed=one.seed, negative_prompt=one.negative_prompt,
        )[0]  # fmt: skip
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)
        plain[one.seed] = expected
    assert (plain[0] - plain[3]).abs().max() > 1e-2


def test_what_cannot_be_mixed_is_refused(place):
    with pytest.raises(CheckpointError, match="is DoRA, which peft does not mix"):
        opened(place / "model", {"x": str(place / "dora")})
    with pytest.raises(CheckpointError, match="holds an adapter alone"):
        opened(place / "ink", adapters(place))
    assert read_adapter(place / "ink").base.name == str(place / "model")
    two = {"checkpoint": "a", "models": {"b": "b"}}
    with pytest.raises(ConfigError, match=r"serve\.adapters are of one student, and tinyflux, b"):
        served_models(ServeConfig(**two, adapters={"x": "y"}))
    with pytest.raises(ConfigError, match=r"serve\.adapters: 'a\.b' cannot be a name"):
        served_models(ServeConfig(checkpoint="a", adapters={"a.b": "y"}))
