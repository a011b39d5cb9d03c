"""Training an adapter: what changes, what a checkpoint keeps of it, and how it goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.students import student
from tests.fixtures.trainers import make_trainer, settings, shadow, weights
from tinyflux.distributed.deepspeed import check_zero
from tinyflux.distributed.first_weights import AnyPlace
from tinyflux.errors import CheckpointError, ConfigError, InputError
from tinyflux.model.adapters import adapter_tensors, is_adapter
from tinyflux.model.loader import load_model, save_model
from tinyflux.trainer.adapter_config import AdapterConfig
from tinyflux.trainer.dropout import SampleDropout
from tinyflux.trainer.init_from import find_weights
from tinyflux.trainer.trainer import Trainer

LORA = AdapterConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A student's directory."""
    return save_model(student(), tmp_path_factory.mktemp("base"))


def make(directory, base, adapter=LORA, **changes):
    return make_trainer(directory, **{
        "total_steps": 4, "init_from": str(base), "adapter": adapter, **changes,
    })  # fmt: skip


def parts(trainer):
    """The tensors that are the adapter's, and the others by their plain names."""
    state = trainer.model.state_dict()
    adapter = adapter_tensors(state)
    others = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()
              if name not in adapter}  # fmt: skip
    return adapter, others


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_adapter_alone_is_trained_and_the_ema_follows_it(tmp_path, base, kind):
    trainer = make(tmp_path, base, AdapterConfig(kind, rank=4))
    first = {name: tensor.clone() for name, tensor in parts(trainer)[0].items()}
    trainer.train(epochs=4)
    assert trainer.current_step == 4
    adapter, others = parts(trainer)
    assert all(not torch.equal(adapter[name], tensor) for name, tensor in first.items())
    before = load_file(base / "model.safetensors")
    assert before.keys() == others.keys()
    assert all(torch.equal(others[name], tensor) for name, tensor in before.items())
    average = trainer.ema.shadow
    for name, tensor in adapter.items():
        assert not torch.equal(average[name], tensor)
        assert not torch.equal(average[name], first[name])
    for name, tensor in trainer.model.state_dict().items():
        assert name in adapter or torch.equal(average[name], tensor)


def test_a_checkpoint_is_the_adapter_alone_and_opens(tmp_path, base):
    trainer = make(tmp_path, base, save_every_steps=4)
    trainer.train(epochs=4)
    kept = tmp_path / "checkpoints" / "step_00000004"
    assert {path.name for path in kept.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "ema.safetensors",
        "optimizer.safetensors", "trainer_state.json",
    }  # fmt: skip
    assert is_adapter(kept)
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    state = load_model(kept, device="cpu", dtype=torch.float32).state_dict()
    adapter, _ = parts(trainer)
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter.items())
    assert load_file(kept / "ema.safetensors").keys() == adapter.keys()


@pytest.mark.parametrize(
    "adapter", [LORA, AdapterConfig("dora", rank=4), AdapterConfig(rank=4, dropout=0.3)]
)
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path, base, adapter):
    rate = {"lr_scheduler": "constant"}
    whole = make(tmp_path / "whole", base, adapter, **rate)
    whole.train(epochs=4)
    stopped = make(tmp_path / "stopped", base, adapter, total_steps=3, **rate)
    stopped.train(epochs=4)
    stopped.save_checkpoint(str(tmp_path / "kept"))
    again = make(tmp_path / "again", base, adapter, **rate)
    again.load_checkpoint(str(tmp_path / "kept"))
    again.train(epochs=4)
    assert again.current_step == whole.current_step
    assert torch.equal(weights(again), weights(whole))
    assert torch.equal(shadow(again), shadow(whole))


def test_each_layer_drops_inputs_of_its_own():
    first, second = SampleDropout(0.5), SampleDropout(0.5, place=1)
    first.seeds = second.seeds = torch.tensor([5, 6])
    x = torch.ones(2, 100)
    assert not torch.equal(first(x), second(x))
    assert 0.3 < (second(x) > 0).float().mean() < 0.7


def test_another_base_or_adapter_is_not_gone_on_with(tmp_path, base):
    trainer = make(tmp_path, base, total_steps=1)
    trainer.train()
    kept = str(tmp_path / "kept")
    trainer.save_checkpoint(kept)
    tensors = load_file(base / "model.safetensors")
    tensors["img_in.bias"] += 1
    other = shutil.copytree(base, tmp_path / "other")
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"on the weights of {base}, and .*'{other}' holds"):
        make(tmp_path, other).load_checkpoint(kept)
    moved = shutil.copytree(base, tmp_path / "moved")
    make(tmp_path, moved).load_checkpoint(kept)
    for adapter, name in (
        (AdapterConfig(rank=2, alpha=8), "rank"),
        (AdapterConfig(rank=4), "alpha"),
        (AdapterConfig("dora", rank=4, alpha=8), "kind"),
    ):
        with pytest.raises(ConfigError, match=rf"kept began with another trainer\.adapter\.{name}"):
            make(tmp_path, base, adapter).load_checkpoint(kept)
    with pytest.raises(ConfigError, match=r"began with trainer\.adapter: keep it so"):
        make_trainer(tmp_path).load_checkpoint(kept)
    plain = make_trainer(tmp_path)
    plain.save_checkpoint(str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"began without trainer\.adapter"):
        make(tmp_path, base).load_checkpoint(str(tmp_path / "plain"))


def test_nothing_begins_on_an_adapter(tmp_path, base):
    trainer = make(tmp_path, base, total_steps=1, save_every_steps=1)
    trainer.train()
    kept = tmp_path / "checkpoints"
    for place in (tmp_path, kept / "step_00000001"):
        with pytest.raises(CheckpointError, match="holds an adapter and no student"):
            find_weights(str(place), True, AnyPlace())
    with pytest.raises(InputError, match="the model has an adapter"):
        Trainer(trainer.model, settings(tmp_path, init_from=str(base), adapter=LORA))


def test_weights_of_another_patch_size_are_no_base(tmp_path, base):
    other = save_model(student(patch_size=2), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"img_in\.weight is \[48, 16\] instead of \[48, 4\]"):
        make(tmp_path, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lore"}, r"kind 'lore' is unknown \(did you mean 'lora'\?\)"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "alpha must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_adapters_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**changes)


def test_runs_that_cannot_train_an_adapter_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.adapter needs trainer\.init_from"):
        settings(tmp_path, adapter=LORA)
    with pytest.raises(ConfigError, match="'muon' is for the blocks' own matrices"):
        settings(tmp_path, adapter=LORA, init_from="x", optimizer="muon")
    with pytest.raises(ConfigError, match=r"trainer\.ema_lengths keeps averages of whole models"):
        settings(tmp_path, adapter=LORA, init_from="x", ema_lengths=[0.05])
    with pytest.raises(ConfigError, match="does not run under DeepSpeed"):
        check_zero(settings(tmp_path, adapter=LORA, init_from="x"), 2)
