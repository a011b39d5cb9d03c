"""What a run can begin with: every kind of place, both weights, other patches, and refusals."""

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.fixtures.students import MODEL, student
from tests.fixtures.trainers import make_trainer, shadow, weights
from tinyflux.distributed.first_weights import AnyPlace
from tinyflux.errors import CheckpointError, ConfigError, DamagedCheckpointError
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, unpack_latents
from tinyflux.model.patches import carry_patches
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.init_from import WeightsFile, begin_from, check_fits, find_weights
from tinyflux.util.files import file_sha256

PLACES = AnyPlace()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory, with two checkpoints and a result, all of different weights."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(root, total_steps=4, save_every_steps=2)
    trainer.train(epochs=4)
    other = {name: tensor + 1 for name, tensor in trainer.ema.shadow.items()}
    final = save_model(trainer.model, root / "final", other)
    files = {"model.safetensors": file_sha256(final / "model.safetensors")}
    (final / "training.json").write_text(json.dumps({"step": 4, "files": files}))
    return root


def begun(source, averaged=True, **changes):
    """The weights that a student begins with."""
    model = TinyFluxDeep(replace(MODEL, **changes))
    begin_from(find_weights(str(source), averaged, PLACES), model, str(source), PLACES)
    return model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("place", "averaged", "file"),
    [
        ("", True, "final/model.safetensors"),
        ("", False, "checkpoints/step_00000004/model.safetensors"),
        ("final", True, "final/model.safetensors"),
        ("final/model.safetensors", True, "final/model.safetensors"),
        ("checkpoints/step_00000002", True, "checkpoints/step_00000002/ema.safetensors"),
        ("checkpoints/step_00000002", False, "checkpoints/step_00000002/model.safetensors"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_every_kind_of_place_gives_its_weights(
    run, tmp_path, monkeypatch, place, averaged, file, remote
):
    source = run / place if place else run
    if remote:
        monkeypatch.setenv("TINYFLUX_LOCAL_DIR", str(tmp_path))
        root = f"memory://{uuid.uuid4().hex}"
        folder = open_folder(root)
        for path in run.rglob("*"):
            if path.is_file():
                folder.write(str(path.relative_to(run)), path.read_bytes())
        source = f"{root}/{place}" if place else root
    assert same(begun(source, averaged), load_file(run / file))


def test_a_run_without_a_result_gives_its_newest_checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    expected = load_file(run / "checkpoints" / "step_00000004" / "ema.safetensors")
    assert same(begun(tmp_path), expected)


def test_a_hub_repository_gives_its_weights(run, tmp_path, monkeypatch):
    """From the hub's own cache, as there is no network."""
    snapshot = tmp_path / "models--someone--flux" / "snapshots" / "abc"
    shutil.copytree(run / "final", snapshot / "final")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert same(begun("someone/flux:final"), load_file(run / "final" / "model.safetensors"))


def test_what_was_found_is_told_to_other_processes(run):
    found = find_weights(str(run), True, PLACES)
    assert WeightsFile.from_json(found.to_json()) == found
    assert found.sha256 == file_sha256(run / "final" / "model.safetensors")


@pytest.mark.parametrize("file", ["ema.safetensors", "model.safetensors"])
def test_damaged_weights_are_refused(run, tmp_path, file):
    checkpoint = shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "one")
    data = bytearray((checkpoint / file).read_bytes())
    data[-3] ^= 1
    (checkpoint / file).write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=rf"{file}' is not as it was written"):
        begun(checkpoint, averaged=file.startswith("ema"))


def test_numbers_that_are_none_are_refused(run, tmp_path):
    tensors = load_file(run / "final" / "model.safetensors")
    tensors["img_in.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "lone.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"not finite, in img_in\.bias"):
        begun(tmp_path / "lone.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 3}, "4 channels, which are no square of latents of 3"),
        ({"num_single_layers": 2}, r"single_blocks\.1.* is missing"),
        (
            {"pooled_projection_dim": 13},
            r"vector_in\.1\.weight is \[48, 12\] instead of \[48, 13\]",
        ),
    ],
)
def test_weights_of_another_student_are_one_sentence(run, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        begun(run, **changes)
    assert f"trainer.init_from '{run}/final/model.safetensors'" in str(caught.value)
    with torch.device("meta"):  # and the same without a model
        outline = TinyFluxDeep(replace(MODEL, **changes))
    with pytest.raises(CheckpointError, match=message):
        check_fits(find_weights(str(run), True, PLACES), outline, PLACES)


def test_places_without_weights_are_one_sentence(run, tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights: name a checkpoint"):
        find_weights(str(tmp_path), True, PLACES)
    with pytest.raises(CheckpointError, match=r"the EMA alone: for trainer\.init_from_ema: false"):
        find_weights(str(run / "final"), False, PLACES)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        begun(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="fetched"):
        begun(f"memory://{uuid.uuid4().hex}/absent.safetensors")


def test_inputs_that_mean_something_else_are_told_in_a_line(run, caplog):
    begun(run, time_scale=1000.0)
    assert "trained with model.time_scale 1.0 (now 1000.0)" in caplog.text


def test_larger_patches_and_back_change_nothing():
    tensors = student().state_dict()
    larger = carry_patches(tensors, 4, 2, "one")
    assert larger["img_in.weight"].shape == (48, 16)
    assert same(carry_patches(larger, 4, 1, "one"), tensors)
    with pytest.raises(CheckpointError, match=r"model\.patch_size 2, whose weights mean nothing"):
        carry_patches(larger, 4, 3, "one")


def test_a_larger_patch_sees_the_mean_of_its_tokens_and_gives_each_its_velocity():
    small, latents = student(), torch.randn(2, 4, 4, 6)
    large = TinyFluxDeep(replace(MODEL, patch_size=2))
    large.load_state_dict(carry_patches(small.state_dict(), 4, 2, "one"))
    tokens = small.img_in(pack_latents(latents)).transpose(1, 2).unflatten(2, (4, 6))
    means = torch.nn.functional.avg_pool2d(tokens, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(large.img_in(pack_latents(latents, 2)), means)
    hidden = torch.randn(2, 6, 48)
    velocities = unpack_latents(large.final_linear(hidden), 4, 6, 2)
    alone = unpack_latents(small.final_linear(hidden), 2, 3)
    assert torch.allclose(velocities, alone.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_a_trainer_begins_with_the_weights_and_goes_on_without_them(run, tmp_path):
    source = shutil.copytree(run / "final", tmp_path / "source")
    settings = {"total_steps": 3, "init_from": str(source)}
    trainer = make_trainer(tmp_path, **settings)
    expected = load_file(source / "model.safetensors")
    assert same(trainer.model.state_dict(), expected)
    assert same(trainer.ema.shadow, expected)
    trainer.train()
    trainer.save_checkpoint(str(tmp_path / "kept"))
    shutil.rmtree(source)
    said = json.loads((tmp_path / "kept" / "trainer_state.json").read_text())
    assert said["init_from"] == {
        "source": str(source), "sha256": file_sha256(run / "final" / "model.safetensors"),
    }  # fmt: skip
    other = make_trainer(tmp_path, total_steps=3)
    other.load_checkpoint(str(tmp_path / "kept"))
    assert torch.equal(weights(other), weights(trainer))
    assert torch.equal(shadow(other), shadow(trainer))
    assert Path(other.loop.state.init_from["source"]) == source


def test_a_trainer_opens_no_urls(tmp_path):
    with pytest.raises(ConfigError, match=r"'memory://x' is a URL, which the library's Trainer"):
        make_trainer(tmp_path, init_from="memory://x")
