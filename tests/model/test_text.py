import pytest

from tests.fixtures.worlds import student_config
from tinyflux.errors import CheckpointError, HubError
from tinyflux.model.loader import load_model
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.text import first_line, last_line


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (ValueError("one"), "one", "one"),
        (ValueError("\n one \n\n two\n"), "one", "two"),
        (ValueError(), "ValueError()", "ValueError()"),
        (ValueError(" \n "), "ValueError(' \\n ')", "ValueError(' \\n ')"),
    ],
)
def test_an_errors_first_and_last_line(error, first, last):
    assert (first_line(error), last_line(error)) == (first, last)


def test_an_error_without_a_message_still_says_what_could_not_be_read(tmp_path, monkeypatch):
    def silent(*args, **kwargs):
        raise RuntimeError

    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("tinyflux.model.loader.load_file", silent)
    with pytest.raises(CheckpointError, match=r"not a checkpoint that can be read: RuntimeError"):
        load_model(tmp_path / "model.safetensors", config=student_config(), device="cpu")
    monkeypatch.setattr("tinyflux.model.pretrained.hf_hub_download", silent)
    with pytest.raises(HubError, match=r"cannot be fetched .*: RuntimeError"):
        ModelZoo(device="cpu", experts_repo="me/teachers").load_lune()
