"""Checkpoints as they are found: directories, files, wrapped names, what does not fit.

Slow: a model of the published size is filled.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.worlds import student_config
from tinyflux.errors import CheckpointError, ConfigError, HubError
from tinyflux.model.loader import load_config, load_model, save_model
from tinyflux.model.model import TinyFluxDeep

GOLDENS = Path(__file__).parents[1] / "goldens"
CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture
def saved(tmp_path):
    model = TinyFluxDeep(student_config()).eval()
    return model, save_model(model, tmp_path / "model")


def assert_same(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_directory_a_file_and_a_pt_file_open(saved, tmp_path):
    model, directory = saved
    assert_same(load_model(str(directory), **CPU), model)
    assert_same(load_model(directory / "model.safetensors", **CPU), model)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert_same(load_model(tmp_path / "bare.pt", config=model.config, **CPU), model)
    assert load_config(directory) == load_config(directory / "config.json") == model.config


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrapped_names_open(saved, tmp_path, prefix):
    model, _ = saved
    save_file({prefix + k: v for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    assert_same(load_model(tmp_path / "w.safetensors", config=model.config, **CPU), model)


def test_a_published_checkpoint_opens_with_its_own_config(tmp_path):
    for end in ("config.json", "model.safetensors"):
        data = (GOLDENS / f"v42_predicted.{end}").read_bytes()
        (tmp_path / end).write_bytes(data)
    model = load_model(tmp_path, **CPU)
    assert model.config.sol_num_stats == 3
    assert model.config.text_padding == "encoder"
    wanted = load_file(GOLDENS / "v42_predicted.model.safetensors")["img_in.weight"]
    torch.testing.assert_close(model.img_in.weight, wanted)


@pytest.mark.slow
def test_tensors_of_the_published_shapes_fill_the_published_preset(tmp_path):
    layout = json.loads((GOLDENS / "published_v42_layout.json").read_text())
    tensors = {
        name: torch.full(shape, 0.5, dtype=torch.bfloat16)
        for name, shape in layout["tensors"].items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(layout["config"]))
    model = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) > 245_000_000
    assert all((p == 0.5).all() for p in model.parameters())


def test_what_does_not_fit_is_named_and_strict_false_skips_it(saved, tmp_path, caplog):
    model, _ = saved
    tensors = dict(model.state_dict())
    del tensors["final_norm.weight"]
    tensors["img_in.bias"] = torch.zeros(7)
    tensors["stray"] = torch.zeros(1)
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(path, config=model.config, **CPU)
    for part in ("final_norm.weight", "img_in.bias [7] for [32]", "stray"):
        assert part in str(caught.value)
    loaded = load_model(path, config=model.config, strict=False, **CPU)
    torch.testing.assert_close(loaded.img_in.weight, model.img_in.weight)
    assert "final_norm.weight" in caplog.text


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("/nowhere/model", CheckpointError, "no checkpoint"),
        ("runs/typo.safetensors", CheckpointError, "no checkpoint"),
        ("someone/something:sub", HubError, "hub repository 'someone/something'"),
    ],
)
def test_missing_checkpoints_are_explained(source, error, message):
    with pytest.raises(error, match=message):
        load_model(source, **CPU)


def test_broken_files_are_explained(saved, tmp_path):
    _, directory = saved
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"can be read"):
        load_model(directory, **CPU)
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="can be read"):
        load_model(tmp_path / "evil.pt", config=student_config(), **CPU)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_config(directory)
    (directory / "config.json").write_text('{"hiden_size": 3}')
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        load_config(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(directory / "model.safetensors", **CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**6, "num_attention_heads": 62_500}, "tensors of another shape"),
        ({"mlp_ratio": 1e9}, "tensors of another shape"),
        ({"mlp_ratio": float("inf")}, "no model can be built of the config"),
        ({"lune_hidden_dim": 10**18}, "no model can be built of the config"),
    ],
)
def test_a_config_of_absurd_sizes_is_a_sentence_before_anything_is_built(saved, change, message):
    _, directory = saved
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, **CPU)
    assert time.process_time() - begun < 1
