import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.errors import ConfigError, InputError
from tinyflux.util import config as plain
from tinyflux.util.buckets import default_buckets, interpolate_buckets
from tinyflux.util.files import atomic_write
from tinyflux.util.predictions import (
    eps_data_from_noise,
    eps_target,
    eps_to_vpred,
    eps_x_t,
    flow_data_from_velocity,
    flow_noise_from_velocity,
    flow_velocity,
    flow_x_t,
    vpred_data_from_velocity,
    vpred_to_eps,
    vpred_velocity,
    vpred_x_t,
)
from tinyflux.util.seeding import generator, randn_for
from tinyflux.util.text import duration, rounded, size

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
levels = st.floats(0.05, 0.95)


def pair(shape):
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@given(shapes, st.floats(0, 1))
def test_flow_is_recovered_from_its_velocity(shape, t):
    data, noise = pair(shape)
    t = torch.full((shape[0],), t, dtype=torch.float64)
    x_t, v = flow_x_t(data, noise, t), flow_velocity(data, noise)
    torch.testing.assert_close(flow_data_from_velocity(x_t, v, t), data)
    torch.testing.assert_close(flow_noise_from_velocity(x_t, v, t), noise)


def test_time_runs_from_noise_to_data():
    data, noise = pair((2, 3))
    torch.testing.assert_close(flow_x_t(data, noise, 0.0), noise)
    torch.testing.assert_close(flow_x_t(data, noise, torch.ones(2)), data)


@given(shapes, levels)
def test_v_and_epsilon_forms_agree(shape, alpha):
    data, noise = pair(shape)
    alpha = torch.full((shape[0],), alpha, dtype=torch.float64)
    x_t, v = vpred_x_t(data, noise, alpha), vpred_velocity(data, noise, alpha)
    torch.testing.assert_close(eps_x_t(data, noise, alpha), x_t)
    torch.testing.assert_close(vpred_data_from_velocity(x_t, v, alpha), data)
    torch.testing.assert_close(eps_data_from_noise(x_t, eps_target(noise), alpha), data)
    torch.testing.assert_close(eps_to_vpred(noise, x_t, alpha), v)
    torch.testing.assert_close(vpred_to_eps(v, x_t, alpha), noise)


def test_levels_are_per_sample():
    data, noise = pair((2, 3, 4))
    x_t = flow_x_t(data, noise, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x_t, torch.stack([noise[0], data[1]]))


def test_draws_depend_on_their_name_alone():
    torch.manual_seed(1)
    first = randn_for((4,), 0, "noise", 7)
    torch.manual_seed(2)
    torch.testing.assert_close(randn_for((4,), 0, "noise", 7), first, rtol=0, atol=0)
    others = [(0, "noise", 8), (1, "noise", 7), (0, "time", 7), (0, "noise", "7"), (0, "noise")]
    for other in others:
        assert not torch.equal(randn_for((4,), *other), first)


def test_a_seed_means_the_same_numbers_everywhere():
    # Frozen: a change here would silently change every cache and every resumed run.
    drawn = torch.rand(3, generator=generator(0, "noise", 7))
    torch.testing.assert_close(drawn, torch.tensor(FROZEN_DRAW), rtol=0, atol=1e-7)


FROZEN_DRAW = [0.23462474, 0.62516463, 0.81796002]


def test_buckets_are_returned_at_their_own_times_and_clamped_outside():
    buckets = default_buckets()
    features = torch.randn(10, 10, 3)
    torch.testing.assert_close(
        interpolate_buckets(features, buckets, buckets), features[range(10), range(10)]
    )
    ends = interpolate_buckets(features[:2], buckets, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.stack([features[0, 0], features[1, 9]]))


@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=5))
def test_between_buckets_a_linear_function_is_exact(times):
    buckets, t = default_buckets(), torch.tensor(times)
    line = (3 * buckets - 1).expand(len(times), -1)
    torch.testing.assert_close(interpolate_buckets(line, buckets, t), 3 * t - 1)


def test_features_that_do_not_fit_the_buckets_are_refused():
    with pytest.raises(InputError, match="10 buckets"):
        interpolate_buckets(torch.zeros(2, 9, 3), default_buckets(), torch.zeros(2))


@dataclass
class Inner:
    rate: float = 0.1
    dtype: torch.dtype = torch.float32


@dataclass
class Outer:
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    maybe: int | None = None
    inner: Inner = field(default_factory=Inner)


def test_a_dataclass_survives_its_dictionary():
    value = Outer("b", (3,), 4, Inner(1.5, torch.bfloat16))
    data = plain.to_dict(value)
    assert data["inner"] == {"rate": 1.5, "dtype": "bfloat16"}
    assert plain.from_dict(Outer, data, "test") == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "b"}, r"unknown key 'nmae' \(did you mean 'name'\?\)"),
        ({"name": 3}, "name must be str"),
        ({"sizes": 3}, "sizes must be a list"),
        ({"inner": {"dtype": "float31"}}, r"did you mean 'float32'\?"),
        ({"inner": 3}, "must hold a mapping"),
    ],
)
def test_wrong_dictionaries_are_explained(data, message):
    with pytest.raises(ConfigError, match=message):
        plain.from_dict(Outer, data, "test")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


PURE = [
    "tinyflux",
    "tinyflux.errors",
    "tinyflux.util.predictions",
    "tinyflux.util.seeding",
    "tinyflux.util.buckets",
    "tinyflux.util.config",
    "tinyflux.model.model",
    "tinyflux.model.teachers",
    "tinyflux.model.zoo",
    "tinyflux.model.loader",
    "tinyflux.trainer.losses",
    "tinyflux.trainer.schedules",
    "tinyflux.trainer.ema",
    "tinyflux.inference.sampler",
    "tinyflux.trainer.step",
    "tinyflux.trainer.trainer",
]


def test_the_pure_library_needs_neither_ray_nor_deepspeed_nor_pyarrow():
    block = "import sys; sys.modules.update(dict.fromkeys(['ray', 'deepspeed', 'pyarrow'])); "
    imports = "; ".join(f"import {name}" for name in PURE)
    subprocess.run([sys.executable, "-c", block + imports], check=True)


def test_importing_the_package_loads_nothing():
    code = "import tinyflux, sys; assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_that_trains_loads_no_frozen_models_library():
    code = (
        "import sys, tinyflux.distributed.train, tinyflux.serving.engine; "
        "assert not {'diffusers', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (duration(0), "0.0 s"),
        (duration(16.04), "16 s"),
        (duration(89.99), "90 s"),
        (duration(100), "1.7 minutes"),
        (duration(3600), "60 minutes"),
        (duration(36_000), "10 hours"),
        (duration(30 * 86_400), "30 days"),
        (size(12), "12 B"),
        (size(999_999), "1.00 MB"),
        (size(12_345_678), "12.3 MB"),
        (size(5e15), "5,000 TB"),
        (rounded(1234.5), "1,200"),
        (rounded(9.99), "10"),
        (rounded(0.000123), "0.00012"),
    ],
)
def test_sizes_and_times_for_people(said, expected):
    assert said == expected


@given(st.floats(1e-6, 1e12), st.integers(1, 6))
def test_a_rounded_number_is_near_and_has_few_digits(value, digits):
    text = rounded(value, digits).replace(",", "")
    assert float(text) == pytest.approx(value, rel=0.5 * 10 ** (1 - digits) + 1e-9)
    assert len(text.replace(".", "").strip("0")) <= digits
    assert "e" not in text
