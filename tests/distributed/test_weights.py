"""Students at paths and URLs, and what tells their weights apart."""

import hashlib

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from tests.fixtures.worlds import student_config
from tinyflux.distributed.weights import load_student, weights_fingerprint
from tinyflux.distributed.weights import student_config as config_of
from tinyflux.errors import CheckpointError
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = TinyFluxDeep(student_config())
    return model, save_model(model, tmp_path / "student")


def test_a_fingerprint_is_that_of_the_model_s_tensors(saved, tmp_path):
    model, directory = saved
    wanted = hashlib.sha256()  # as pictures' notes have had it since they are written
    for name, tensor in sorted(model.state_dict().items()):
        wanted.update(name.encode() + tensor.float().numpy().tobytes())
    print_ = weights_fingerprint(str(directory))
    assert print_ == wanted.hexdigest()[:16]
    assert weights_fingerprint(str(directory / "model.safetensors")) == print_
    torch.save({f"module.{name}": one for name, one in model.state_dict().items()},
               tmp_path / "student" / "wrapped.pt")  # fmt: skip
    assert weights_fingerprint(str(directory / "wrapped.pt")) == print_
    changed = {name: one + 1 for name, one in model.state_dict().items()}
    save_file(changed, directory / "model.safetensors")
    assert weights_fingerprint(str(directory)) != print_
    (directory / "model.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="is not a checkpoint that can be read"):
        weights_fingerprint(str(directory))


def test_a_url_may_name_a_directory_or_one_of_its_files(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYFLUX_LOCAL_DIR", str(tmp_path / "local"))
    model, directory = saved
    averaged = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(averaged, directory / "ema.safetensors")
    url = f"memory://{tmp_path.name}/student"
    fsspec.filesystem("memory").put(str(directory), f"/{tmp_path.name}/student", recursive=True)
    for place, wanted in ((url, model.state_dict()), (f"{url}/ema.safetensors", averaged)):
        student = load_student(place, "cpu", torch.float32)
        assert config_of(place) == student.config == model.config
        torch.testing.assert_close(student.state_dict(), wanted, rtol=0, atol=0)
