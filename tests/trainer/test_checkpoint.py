"""Checkpoints know what was written, and nothing half-loaded is left behind."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.trainers import make_trainer, shadow, weights
from tinyflux.errors import CheckpointError, DamagedCheckpointError, InputError, TrainingError
from tinyflux.inference.sampler import Sampler
from tinyflux.model.loader import load_model
from tinyflux.storage.folder import LocalFolder
from tinyflux.trainer.checkpoint import load_checkpoint
from tinyflux.trainer.checkpoint_folder import prune
from tinyflux.trainer.checkpoint_search import latest_checkpoint, load_newest
from tinyflux.trainer.checkpoint_state import read_state
from tinyflux.trainer.metrics import MetricLog, best_record, read_metrics

WRITTEN = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.json")


@pytest.fixture
def saved(tmp_path):
    """A trainer after two steps, and its checkpoint."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    path = tmp_path / "checkpoints" / "step_00000002"
    trainer.save_checkpoint(str(path))
    return trainer, path


def optimizer_of(trainer, path):
    """The optimizer's state as a checkpoint has it."""
    trainer.save_checkpoint(str(path))
    return load_file(path / "optimizer.safetensors")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def state_of(path):
    return json.loads((path / "trainer_state.json").read_text())


@pytest.mark.parametrize("name", WRITTEN)
def test_a_flipped_bit_is_found_and_changes_nothing(saved, tmp_path, name):
    _, path = saved
    place = random.Random(name).randrange(
        (path / name).stat().st_size // 2, (path / name).stat().st_size
    )
    flip(path / name, place)
    fresh = make_trainer(tmp_path)
    before = weights(fresh)
    with pytest.raises(DamagedCheckpointError, match=rf"{name} is not as it was written"):
        fresh.load_checkpoint(str(path))
    assert torch.equal(weights(fresh), before)
    assert fresh.current_step == 0


def test_another_number_in_the_state_is_found(saved, tmp_path):
    _, path = saved
    state = path / "trainer_state.json"
    state.write_text(state.read_text().replace('"samples_seen": 12', '"samples_seen": 13'))
    with pytest.raises(DamagedCheckpointError, match=r"trainer_state\.json is not as it was"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_numbers_that_are_none_are_refused_even_without_a_digest(saved, name):
    _, path = saved
    tensors = load_file(path / f"{name}.safetensors")
    key = next(key for key, tensor in tensors.items() if tensor.numel() > 1)
    tensors[key].view(-1)[::2] = float("nan")
    metadata = {"ema": '{"decay": 0.9}'} if name == "ema" else None
    save_file(tensors, path / f"{name}.safetensors", metadata)
    state = state_of(path)
    for digest in ("sha256", "files"):  # as of a checkpoint of an earlier version
        state.pop(digest, None)
    (path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(DamagedCheckpointError, match=rf"{name}\.safetensors holds numbers that"):
        load_checkpoint(path)
    assert load_checkpoint(path, verify=False).state.step == 2


def test_a_checkpoint_without_digests_still_loads(saved, tmp_path):
    trainer, path = saved
    state = state_of(path)
    assert state.pop("files").keys() == set(WRITTEN)
    assert len(state.pop("sha256")) == 64
    (path / "trainer_state.json").write_text(json.dumps(state))
    fresh = make_trainer(tmp_path)
    fresh.load_checkpoint(str(path))
    assert torch.equal(weights(fresh), weights(trainer))
    assert torch.equal(shadow(fresh), shadow(trainer))


def test_a_giants_digests_need_not_be_compared(saved, tmp_path):
    _, path = saved
    flip(path / "optimizer.safetensors", -1)
    fresh = make_trainer(tmp_path, verify_checkpoints=False)
    fresh.load_checkpoint(str(path))
    assert fresh.current_step == 2


@pytest.mark.parametrize("damage", ["{", "[]", "[" * 100_000, '{"format_version": 1, "step": "x"}'])
def test_the_newest_whole_checkpoint_is_found_beside_a_damaged_one(saved, caplog, damage):
    trainer, path = saved
    later = path.with_name("step_00000004")
    trainer.save_checkpoint(str(later))
    (later / "trainer_state.json").write_text(damage)
    assert latest_checkpoint(path.parent) == path
    assert [record.message.count("step_00000004") for record in caplog.records] == [1]


def newest(root):
    return load_newest(LocalFolder(root), root.joinpath, verify=True).name


def test_the_newest_whole_checkpoint_is_found_by_its_digests(saved, tmp_path, caplog):
    trainer, path = saved
    trainer.train()
    later = path.with_name("step_00000004")
    trainer.save_checkpoint(str(later))
    assert newest(path.parent) == later.name
    flip(later / "ema.safetensors", -1)
    assert newest(path.parent) == path.name
    assert "ema.safetensors is not as it was written" in caplog.text


def test_pruning_after_an_older_one_was_taken_keeps_what_the_run_writes(saved):
    trainer, path = saved
    for step in (3, 4, 8):
        trainer.save_checkpoint(str(path.with_name(f"step_{step:08d}")))
    (path.with_name("step_00000008") / "model.safetensors").write_bytes(b"damaged")
    prune(path.with_name("step_00000004"), keep=1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_00000004", "step_00000008"]
    assert read_state(path.with_name("step_00000004")).step == 2


@pytest.mark.parametrize(
    ("optimizer", "change", "message"),
    [
        ("adamw", {"img_in.weight/exp_avg": torch.zeros(3)}, r"img_in\.weight/exp_avg.* is \[3\]"),
        ("adamw", {"img_in.weight/exp_avg": None}, r"img_in\.weight/exp_avg.* is missing"),
        ("adamw", {"img_in.weight/momentum": torch.zeros(3)}, r"momentum.* is unknown"),
        ("adamw", {"nothing.weight/step": torch.zeros(())}, "fits no trainable parameter"),
        ("adafactor", {}, "is missing"),
    ],
)
def test_a_bad_optimizer_state_is_found_before_anything_is_changed(
    saved, tmp_path, optimizer, change, message
):
    _, path = saved
    state = load_file(path / "optimizer.safetensors")
    state |= change
    save_file({k: v for k, v in state.items() if v is not None}, path / "optimizer.safetensors")
    record = state_of(path)
    for digest in ("sha256", "files"):
        record.pop(digest, None)
    (path / "trainer_state.json").write_text(json.dumps(record))
    torch.manual_seed(1)
    fresh = make_trainer(tmp_path / "fresh", optimizer=optimizer)
    before, averaged = weights(fresh), shadow(fresh)
    kept = optimizer_of(fresh, tmp_path / "before").keys()
    with pytest.raises(CheckpointError, match=message):
        fresh.load_checkpoint(str(path))
    assert torch.equal(weights(fresh), before)
    assert torch.equal(shadow(fresh), averaged)
    assert optimizer_of(fresh, tmp_path / "after").keys() == kept
    assert fresh.current_step == 0
    fresh.train()  # nothing of it is left half-loaded


def test_lines_that_are_no_records_do_not_stop_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[1]\n3\n{"loss": 1}\n'
        + b"[" * 100_000
        + b'\n{"step": 2, "val_velocity_ema": 1.5}\n{"step": 4, "val_velocity_ema": 1.7}\n'
    )
    log = MetricLog(path, [], step=2)
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_the_best_step_is_the_one_of_the_lowest_held_out_loss_of_the_ema():
    records = [
        {"step": 0, "val_velocity_ema": 2.0}, {"step": 1, "loss": 0.1},
        {"step": 2, "val_velocity_ema": 1.1}, {"step": 4, "val_velocity_ema": None},
        {"step": 6, "val_velocity_ema": 1.1}, {"step": 8, "val_velocity_ema": 1.4},
    ]  # fmt: skip
    assert best_record(records)["step"] == 2
    assert best_record([{"step": 1, "loss": 0.1}]) is None


def test_a_sampler_on_another_device_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    sampler = Sampler(None, trainer.model, trainer.ema, device="meta")  # it moves the model
    with pytest.raises(InputError, match="the sampler draws on meta and the trainer trains on cpu"):
        trainer.setup([], sampler=sampler)
    with pytest.raises(TrainingError, match="was moved from cpu to meta"):
        trainer.train()


def test_a_config_of_a_million_layers_is_refused_at_once(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_double_layers": 10**6}))
    with pytest.raises(CheckpointError, match="cannot be 1000001 layers"):
        load_model(path, device="cpu")
    (path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested without end"):
        load_model(path, device="cpu")
