import io

import pytest
from PIL import Image

from tests.fixtures.requests import request
from tests.fixtures.serving_place import make_place
from tests.fixtures.worlds import zoo_config
from tinyflux.errors import InputError
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def engine(place):
    config = ServeConfig(
        checkpoint=str(place / "model"), max_steps=10, max_size=32,
        default_steps=2, default_size=16,
    )  # fmt: skip
    engine = open_engine(config, zoo_config(place / "world"))
    yield engine
    engine.close(drain=False)


def test_a_request_gives_one_picture_of_its_size_and_seed(engine):
    png = engine.generate(request())
    assert Image.open(io.BytesIO(png)).size == (24, 16)
    assert engine.generate(request()) == png
    assert engine.generate(request(seed=4)) != png
    assert engine.generate(request(prompt="blue square")) != png


def test_what_is_beyond_the_encoders_limits_draws_nothing(engine):
    long = "red " * 100
    png = engine.generate(request(prompt=long))
    assert png == engine.generate(request(prompt=f"{long} blue"))
    assert png != engine.generate(request(prompt="red"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 4096}, "multiple of 4 from 4 to 32 pixels, not 4096"),
        ({"height": 17}, "not 17"),
        ({"num_steps": 11}, "num_steps must be from 1 to 10"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "a" * 2000}, "2000 characters"),
    ],
)
def test_absurd_requests_are_refused(engine, changes, message):
    with pytest.raises(InputError, match=message):
        engine.generate(request(**changes))
