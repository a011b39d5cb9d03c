"""The plain trainer: what it learns, keeps, continues and refuses.

Slow: one model is compiled.
"""

import json
import re
import resource
import sys
import threading
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from tests.fixtures.fake_zoo import FakeZoo
from tests.fixtures.students import MODEL, make_batch
from tests.fixtures.trainers import (
    NULL_TEXT,
    Encodings,
    Features,
    make_trainer,
    settings,
    shadow,
    weights,
)
from tests.fixtures.waiting import PATIENCE, wait_for
from tinyflux.data.batches import HeldOut
from tinyflux.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingDependencyError,
    TrainingError,
)
from tinyflux.inference.sampler import Sampler
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.trainer.cache_experts import (
    DatasetCache,
    EncodingCache,
    LuneFeatureCache,
    MultiSourceCache,
)
from tinyflux.trainer.checkpoint import CheckpointData, save_checkpoint
from tinyflux.trainer.checkpoint_folder import remove_partial
from tinyflux.trainer.checkpoint_search import latest_checkpoint
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.prefetch import prefetch
from tinyflux.trainer.trainer import Trainer
from tinyflux.trainer.writer import BackgroundWriter
from tinyflux.util.buckets import default_buckets


def test_training_lowers_every_loss(tmp_path):
    data = Encodings()
    data.batch.latents[:] = 2.0
    seen = HeldOut([data.batch], [[str(index) for index in range(12)]])
    changes = {"learning_rate": 3e-3, "total_steps": 80, "validate_every": 80, "text_dropout": 0.0}
    trainer = make_trainer(tmp_path, 6, data, held_out=seen, **changes)
    trainer.train(epochs=100)
    assert trainer.current_step == 80
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    first, last = (record for record in records if "val_velocity" in record)
    for name in ("val_velocity", "val_velocity_ema", "val_lune", "val_sol"):
        assert last[name] < 0.95 * first[name]
    assert list((tmp_path / "logs").glob("events*"))


def test_accumulation_trains_the_same_as_whole_batches(tmp_path):
    cut = make_trainer(tmp_path / "a", batch_size=3, gradient_accumulation=2)
    whole = make_trainer(tmp_path / "b", batch_size=6, gradient_accumulation=1)
    for trainer in (cut, whole):
        trainer.train(epochs=2)
        assert trainer.current_step == 4
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-4, atol=2e-5)


def test_a_short_last_batch_counts_by_its_samples(tmp_path):
    cut = make_trainer(tmp_path / "a", batch_size=5, gradient_accumulation=3)
    whole = make_trainer(tmp_path / "b", batch_size=12, gradient_accumulation=1)
    for trainer in (cut, whole):
        trainer.train(epochs=2)
        assert trainer.current_step == 2
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw_8bit"])
@pytest.mark.parametrize("matrices_only", [False, True])
def test_stopped_in_the_middle_of_a_pass_it_resumes_bit_for_bit(tmp_path, optimizer, matrices_only):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    constant = {
        "lr_scheduler": "constant",
        "optimizer": optimizer,
        "decay_matrices_only": matrices_only,
    }
    straight = make_trainer(tmp_path / "a", **constant)
    straight.train(epochs=4)
    first = make_trainer(tmp_path / "b", total_steps=3, **constant)
    first.train(epochs=4)
    first.save_checkpoint(str(tmp_path / "checkpoint"))
    torch.manual_seed(99)
    second = make_trainer(tmp_path / "b", **constant)
    second.load_checkpoint(str(tmp_path / "checkpoint"))
    second.train(epochs=3)
    assert torch.equal(weights(second), weights(straight))
    assert torch.equal(shadow(second), shadow(straight))
    steps = [r["step"] for r in read_metrics(tmp_path / "b" / "logs" / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_a_run_that_stopped_in_its_stable_part_goes_on_and_falls_as_one_that_did_not(tmp_path):
    """Also where it was meant to be shorter: the rate before the fall does not know."""
    schedule = {"lr_scheduler": "wsd", "warmup_steps": 2, "lr_decay_ratio": 0.5}
    straight = make_trainer(tmp_path / "a", total_steps=8, **schedule)
    straight.train(epochs=9)
    first = make_trainer(tmp_path / "b", total_steps=8, save_every_steps=3, **schedule)
    first.train(epochs=2)
    assert first.current_step == 4
    second = make_trainer(tmp_path / "b", total_steps=8, **schedule)
    second.load_checkpoint(str(tmp_path / "b" / "checkpoints" / "step_00000003"))
    second.train(epochs=9)
    assert second.current_step == 8
    assert torch.equal(weights(second), weights(straight))
    shorter = make_trainer(tmp_path / "c", total_steps=6, save_every_steps=3, **schedule)
    shorter.train(epochs=9)
    third = make_trainer(tmp_path / "d", total_steps=8, **schedule)
    third.load_checkpoint(str(tmp_path / "c" / "checkpoints" / "step_00000003"))
    third.train(epochs=9)
    assert torch.equal(weights(third), weights(straight))
    assert not torch.equal(weights(shorter), weights(straight))


@pytest.mark.parametrize("warmup", [True, False])
def test_the_ema_warms_up_unless_it_is_told_not_to(tmp_path, warmup):
    trainer = make_trainer(tmp_path, total_steps=6, ema_decay=0.3, ema_warmup=warmup)
    by_hand = EMA(trainer.model, 0.3)

    def data():
        for step, item in enumerate(trainer.steps(9)):
            yield item
            # The loop asks for the next step's data when it is done with this one.
            by_hand.update(trainer.model, min(0.3, (1 + step) / (10 + step)) if warmup else None)

    trainer.loop.run(data(), ahead=False)
    # The last step is followed by no question for data.
    by_hand.update(trainer.model, 0.3)
    assert trainer.current_step == 6
    assert all(torch.equal(trainer.ema.shadow[n], by_hand.shadow[n]) for n in by_hand.shadow)


def test_a_short_run_delivers_no_random_start(tmp_path):
    """At 0.9999 an EMA that does not warm up is still 99.8% the first weights after 20 steps."""
    trainer = make_trainer(tmp_path, total_steps=20, ema_decay=0.9999)
    start = shadow(trainer)
    trainer.train(epochs=99)
    left = (shadow(trainer) - weights(trainer)).norm() / (start - weights(trainer)).norm()
    assert left < 0.5
    path = tmp_path / "saved"
    trainer.save_checkpoint(str(path))
    assert EMA.load(path / "ema.safetensors", trainer.model).decay == 0.9999


@pytest.mark.parametrize("warmup", [True, False])
def test_the_ema_warms_up_alike_across_a_resume(tmp_path, warmup):
    constant = {"lr_scheduler": "constant", "ema_decay": 0.4, "ema_warmup": warmup}
    straight = make_trainer(tmp_path / "a", total_steps=9, **constant)
    straight.train(epochs=9)
    make_trainer(tmp_path / "b", total_steps=5, save_every_steps=2, **constant).train(epochs=9)
    # Once from inside the warm-up, which ends with step 5, and once from its end.
    for step in (2, 5):
        resumed = make_trainer(tmp_path / "b", total_steps=9, **constant)
        resumed.load_checkpoint(str(tmp_path / "b" / "checkpoints" / f"step_{step:08d}"))
        resumed.train(epochs=9)
        assert resumed.current_step == 9
        assert torch.equal(weights(resumed), weights(straight))
        assert torch.equal(shadow(resumed), shadow(straight))


def test_checkpoints_are_pruned_and_the_latest_is_found(tmp_path):
    trainer = make_trainer(
        tmp_path, save_every_steps=1, save_every_epochs=1, keep_last_n_steps=2, keep_last_n_epochs=1
    )
    trainer.train(epochs=3)
    root = tmp_path / "checkpoints"
    names = sorted(path.name for path in root.iterdir())
    assert names == ["epoch_0003", "step_00000005", "step_00000006"]
    (root / ".step_00000009.1.partial").mkdir()
    (root / "step_00000008").mkdir()  # killed while it was deleted
    assert latest_checkpoint(root) == root / "step_00000006"
    remove_partial(root)
    assert sorted(path.name for path in root.iterdir()) == names


def test_a_checkpoint_opens_as_a_model(tmp_path):
    from tinyflux.model.loader import load_model

    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_checkpoint(str(tmp_path / "saved"))
    loaded = load_model(str(tmp_path / "saved"), device="cpu", dtype=torch.float32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), trainer.model.state_dict().values())  # noqa: B905
    )


def test_broken_and_foreign_checkpoints_are_refused_and_change_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    before = weights(trainer)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        trainer.load_checkpoint(str(tmp_path / "nowhere"))
    trainer.save_checkpoint(str(tmp_path / "saved"))
    other = Trainer(
        TinyFluxDeep(TinyFluxConfig(**{**vars(MODEL), "sol_hidden_dim": 8})), settings(tmp_path)
    )
    with pytest.raises(CheckpointError, match="does not fit the model"):
        other.load_checkpoint(str(tmp_path / "saved"))
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        trainer.load_checkpoint(str(tmp_path / "saved"))
    assert torch.equal(weights(trainer), before)


def test_a_snapshot_is_written_as_the_run_stood_byte_for_byte(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    optimizer = trainer.loop.engine.optimizer_state()
    weights, shadow = trainer.model.state_dict(), trainer.ema.shadow
    contents = CheckpointData(trainer.model, weights, shadow, 0.9, optimizer, trainer.loop.state)
    snapshot = contents.snapshot()
    save_checkpoint(tmp_path / "now", contents)
    trainer.train()  # changes weights, EMA, optimizer state and step in place
    save_checkpoint(tmp_path / "later", snapshot)
    save_checkpoint(tmp_path / "changed", contents)
    names = ["config.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    names.append("trainer_state.json")
    assert sorted(path.name for path in (tmp_path / "later").iterdir()) == names
    for name in names:
        now, later, changed = (
            (tmp_path / kind / name).read_bytes() for kind in ("now", "later", "changed")
        )
        assert now == later
        assert (now == changed) == (name == "config.json")


def checkpoint_files(root):
    """Every checkpoint's files, without the one setting that a comparison varies."""
    return {
        str(path.relative_to(root)): re.sub(
            rb'"async_checkpoints": \w+|"sha256": "\w+"', b"", path.read_bytes()
        )
        for path in root.rglob("*.*")
    }


def test_a_run_leaves_the_same_checkpoints_whichever_way_they_are_written(tmp_path):
    found = []
    for name, wanted in (("a", True), ("b", False)):
        # Paths are settings too, so both runs train in one place.
        trainer = make_trainer(
            tmp_path / "run",
            async_checkpoints=wanted,
            save_every_steps=1,
            save_every_epochs=1,
            keep_last_n_steps=2,
        )
        trainer.train(epochs=2)
        (tmp_path / "run").rename(tmp_path / name)
        found.append(checkpoint_files(tmp_path / name / "checkpoints"))
    assert found[0] == found[1]
    assert len(found[0]) == 4 * 5


def test_training_goes_on_while_a_checkpoint_is_written_as_it_was(tmp_path, monkeypatch):
    constant = {"lr_scheduler": "constant"}
    straight = make_trainer(tmp_path / "a", total_steps=8, **constant)
    straight.train(epochs=9)

    disk, begun = threading.Event(), []

    def slow(directory, contents):
        begun.append(directory.name)
        assert disk.wait(PATIENCE)
        save_checkpoint(directory, contents)

    monkeypatch.setattr("tinyflux.trainer.recorder.save_checkpoint", slow)
    trainer = make_trainer(tmp_path / "b", total_steps=6, save_every_steps=3, **constant)
    root = tmp_path / "b" / "checkpoints"

    def data():
        for item in trainer.steps(9):
            if trainer.current_step == 5:  # two steps past the checkpoint that is still unwritten
                assert begun == ["step_00000003"]
                assert latest_checkpoint(root) is None
                disk.set()
            yield item

    trainer.loop.run(data(), ahead=False)
    assert begun == ["step_00000003", "step_00000006"]
    assert latest_checkpoint(root) == root / "step_00000006"

    for name in begun:
        resumed = make_trainer(tmp_path / "b", total_steps=8, **constant)
        resumed.load_checkpoint(str(root / name))
        resumed.train(epochs=9)
        assert torch.equal(weights(resumed), weights(straight))
        assert torch.equal(shadow(resumed), shadow(straight))


@pytest.mark.parametrize("failing", [2, 6])
def test_a_disk_that_is_full_in_the_thread_ends_the_run_with_the_sentence(
    tmp_path, monkeypatch, failing
):
    trainer = make_trainer(tmp_path, total_steps=6, save_every_steps=2)
    failed = threading.Event()

    def full(*args, **kwargs):
        if f"step_{failing:08d}" not in str(args[1]):
            return save_file(*args, **kwargs)
        failed.set()
        raise OSError(28, "No space left on device")

    def data():
        for item in trainer.steps(9):
            if trainer.current_step == failing:
                assert failed.wait(PATIENCE)
                wait_for(lambda: not trainer.loop.recorder.writing)
            yield item

    monkeypatch.setattr("tinyflux.trainer.checkpoint.save_file", full)
    message = (
        rf"cannot write checkpoint .*step_{failing:08d}: .*No space left on device; "
        "earlier checkpoints are intact"
    )
    with pytest.raises(CheckpointError, match=message):
        trainer.loop.run(data(), ahead=False)
    assert trainer.current_step == failing  # the next step was not made
    earlier = [f"step_{step:08d}" for step in range(2, failing, 2)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == earlier


def test_an_error_in_training_waits_for_the_checkpoint_and_is_the_one_raised(
    tmp_path, monkeypatch, caplog
):
    for name, fails in (("a", False), ("b", True)):
        begun, disk = threading.Event(), threading.Event()

        def slow(directory, contents, fails=fails, begun=begun, disk=disk):
            begun.set()
            assert disk.wait(PATIENCE)
            if fails:
                raise CheckpointError("cannot write checkpoint")
            save_checkpoint(directory, contents)

        def data(trainer, begun=begun, disk=disk):
            yield from islice(trainer.steps(9), 2)
            assert begun.wait(PATIENCE)
            threading.Timer(0.2, disk.set).start()
            raise InputError("broken sample")

        monkeypatch.setattr("tinyflux.trainer.recorder.save_checkpoint", slow)
        trainer = make_trainer(tmp_path / name, save_every_steps=2)
        with pytest.raises(InputError, match="broken sample"):
            trainer.loop.run(data(trainer), ahead=False)
        found = latest_checkpoint(tmp_path / name / "checkpoints")
        assert (found is None) == fails
        assert ("cannot write checkpoint" in caplog.text) == fails


def test_a_second_write_waits_for_the_first_and_errors_are_raised_once():
    writer, disk, done = BackgroundWriter(), threading.Event(), []

    def first():
        assert disk.wait(PATIENCE)
        done.append("first")
        raise OSError("full")

    writer.submit(first)
    writer.check()  # does not wait
    threading.Timer(0.2, disk.set).start()
    with pytest.raises(OSError, match="full"):
        writer.submit(lambda: done.append("never"))
    writer.submit(lambda: done.append("second"))
    writer.wait()
    writer.close()
    assert done == ["first", "second"]


def test_a_failed_write_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    target = tmp_path / "checkpoints" / "step_00000001"
    trainer.save_checkpoint(str(target))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyflux.trainer.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints"):
        trainer.save_checkpoint(str(target))
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    make_trainer(tmp_path).load_checkpoint(str(target))


@contextmanager
def file_size_limit(size):
    """Writes past ``size`` bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Weights and EMA take 590 KB each, the optimizer's state 1.2 MB.
@pytest.mark.parametrize("size", [100_000, 592_000, 593_400, 700_000])
def test_after_a_full_disk_a_run_continues_from_the_checkpoint_before(tmp_path, size):
    checkpoints = tmp_path / "checkpoints"

    def begin(directory, total_steps):
        settings = {"save_every_steps": 2, "lr_scheduler": "constant"}
        trainer = make_trainer(directory, total_steps=total_steps, **settings)
        if directory == tmp_path and (latest := latest_checkpoint(checkpoints)):
            trainer.load_checkpoint(str(latest))
        return trainer

    straight = begin(tmp_path / "straight", 4)
    straight.train(2)
    begin(tmp_path, 2).train(1)
    trainer = begin(tmp_path, 4)
    with file_size_limit(size), pytest.raises(CheckpointError) as caught:
        trainer.train(1)
    message = r"cannot write checkpoint .*step_00000004: .*; earlier checkpoints are intact"
    assert re.fullmatch(message, str(caught.value))
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]

    resumed = begin(tmp_path, 4)
    resumed.train(1)
    assert torch.equal(weights(resumed), weights(straight))


# TensorBoard's own thread dies of it too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_logs_on_a_full_disk_end_the_run_with_one_sentence(tmp_path):
    trainer = make_trainer(tmp_path, log_every=1, total_steps=50)
    with file_size_limit(500), pytest.raises(TrainingError, match=r"cannot write to .*; make room"):
        trainer.train(50)


def test_non_finite_gradients_are_skipped_and_then_end_the_run(tmp_path):
    data = Encodings()
    data.batch.latents[:] = float("inf")
    trainer = make_trainer(tmp_path, data=data, max_nonfinite_steps=3, total_steps=50)
    before = weights(trainer)
    # Seen at the second log line: between two of them nothing is read from the device.
    with pytest.raises(TrainingError, match="not finite for 4 steps in a row"):
        trainer.train(epochs=20)
    assert torch.equal(weights(trainer), before)
    assert trainer.current_step == 4


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_one_bad_batch_costs_one_step(tmp_path, optimizer):
    data = Encodings()
    data.batch.latents[4] = float("nan")
    trainer = make_trainer(tmp_path, data=data, optimizer=optimizer)
    trainer.train(epochs=3)
    assert weights(trainer).isfinite().all()
    assert trainer.loop.engine.skips.read()[0] == 3
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    assert records[-1]["skipped_steps"] == 3
    assert "NaN" not in json.dumps(records)


def draws(trainer):
    return Sampler(FakeZoo(), trainer.model, trainer.ema, "cpu", torch.float32)


def test_samples_validation_and_their_logs(tmp_path):
    trainer = make_trainer(
        tmp_path,
        sampler=draws,
        held_out=HeldOut([make_batch()[:3]], [["a", "b", "c"]]),
        sample_every=2,
        sample_prompts=["a cat", "a dog"],
        sample_steps=2,
        validate_every=2,
        total_steps=4,
    )
    trainer.train(epochs=9)
    assert sorted(p.name for p in (tmp_path / "samples").glob("*.png")) == [
        "step_00000002.png",
        "step_00000004.png",
    ]
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    validated = [record for record in records if "val_velocity" in record]
    assert [record["step"] for record in validated] == [0, 2, 4]
    assert {"val_lune", "val_sol", "val_velocity_ema"} <= validated[0].keys()


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ({}, (48, 32)),
        ({"sample_size": "24x16"}, (24, 16)),
        ({"sample_height": 2, "sample_width": 3}, (24, 16)),  # latents
    ],
)
def test_samples_are_of_the_trainings_size_or_another(tmp_path, size, pixels):
    trainer = make_trainer(
        tmp_path, sampler=draws, sample_every=1, sample_prompts=["a cat"], sample_steps=1,
        total_steps=1, **size,
    )  # fmt: skip
    trainer.train(epochs=1)
    with Image.open(tmp_path / "samples" / "step_00000001.png") as picture:
        width, height = picture.size
    frame = 2 * 2  # of a grid, around its only picture
    assert (width - frame, height - frame) == pixels


def test_a_sample_size_that_latents_cannot_fill_is_said_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="sample_size: the width must be a multiple of 8"):
        make_trainer(tmp_path, sampler=draws, sample_prompts=["a cat"], sample_size=20)


def test_neither_samples_nor_validation_change_training(tmp_path):
    plain = make_trainer(tmp_path / "a")
    plain.train(epochs=2)
    watched = make_trainer(
        tmp_path / "b",
        sampler=draws,
        held_out=HeldOut([make_batch()[:2]], [["a", "b"]]),
        sample_every=1,
        sample_prompts=["a cat"],
        sample_steps=1,
        validate_every=1,
    )
    watched.train(epochs=2)
    assert torch.equal(weights(plain), weights(watched))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"dtype": torch.bfloat16}])
def test_memory_options_train_nearly_the_same(tmp_path, changes):
    plain, other = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", **changes)
    for trainer in (plain, other):
        trainer.train(epochs=2)
    assert other.model.img_in.weight.dtype == torch.float32
    torch.testing.assert_close(weights(other), weights(plain), rtol=0.1, atol=5e-3)


def test_a_model_in_half_precision_is_trained_in_fp32(tmp_path):
    trainer = Trainer(TinyFluxDeep(MODEL).bfloat16(), settings(tmp_path))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_missing_pieces_are_named(tmp_path, monkeypatch):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path, text_dropout=0.0))
    with pytest.raises(TrainingError, match=r"call Trainer\.setup"):
        trainer.train()
    items = [{"latents": torch.zeros(4, 2, 2)}]
    trainer.setup(DataLoader(items))
    with pytest.raises(InputError, match="no 't5_embeds'"):
        trainer.train()
    trainer.setup(DataLoader(items), Features(make_batch()))
    with pytest.raises(InputError, match="no 'index'"):
        trainer.train()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        Trainer(TinyFluxDeep(MODEL), settings(tmp_path, optimizer="adamw_8bit"))


def test_prefetch_keeps_order_passes_errors_and_ends(tmp_path):
    assert list(prefetch(range(100))) == list(range(100))

    def broken():
        yield 1
        raise ValueError("bad sample")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="bad sample"):
        next(items)
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()


def test_metrics_survive_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def encodings(null=None, size=4):
    batch = make_batch(size)
    parts = (batch.latents, batch.t5_embeds, batch.clip_pooled)
    return EncodingCache(*parts, dtype=torch.float32, null_text=null)


def null_of(trainer):
    """T5 and pooled embeddings that dropped captions are trained on, as one ``[L * D + P]``."""
    return torch.cat([part.flatten() for part in trainer.loop.null_text])


ONES = (torch.ones(5, 24), torch.ones(12))
TWOS = (2 * ONES[0], 2 * ONES[1])


@pytest.mark.parametrize(
    "dataset",
    [
        encodings(ONES),
        Subset(encodings(ONES), [0, 2]),
        ConcatDataset([encodings(ONES), Subset(encodings(ONES), [1])]),
        ConcatDataset([Encodings(), encodings(ONES)]),  # the first knows none
    ],
    ids=["cache", "subset", "concatenated", "known to one"],
)
def test_the_null_caption_is_read_from_the_dataset(tmp_path, dataset):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path, text_dropout=1.0))
    trainer.setup(DataLoader(dataset, batch_size=2))
    assert (null_of(trainer) == 1).all()
    trainer.train()
    assert trainer.current_step > 0


def test_the_null_caption_that_is_given_or_cached_comes_first(tmp_path):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path))
    loader = DataLoader(encodings(ONES), batch_size=2)
    cache = MultiSourceCache().add(DatasetCache(encodings(TWOS)), 0)
    trainer.setup(loader, cache)
    assert (null_of(trainer) == 2).all()
    trainer.setup(loader, cache, null_text=NULL_TEXT)
    assert (null_of(trainer) == 0).all()


def test_dropped_captions_without_a_null_caption_are_refused(tmp_path):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path))
    for data in (Encodings(), encodings(), Subset(encodings(), [0])):
        with pytest.raises(InputError, match=r"null_text=.*, or set trainer\.text_dropout to 0"):
            trainer.setup(DataLoader(data, batch_size=2), Features(make_batch()))
    two = ConcatDataset([encodings(ONES), encodings(TWOS)])
    with pytest.raises(InputError, match="datasets hold different embeddings"):
        trainer.setup(DataLoader(two, batch_size=2))
    trainer.setup(DataLoader(two, batch_size=2), null_text=ONES)
    keeps_all = Trainer(TinyFluxDeep(MODEL), settings(tmp_path, text_dropout=0.0))
    for data in (Encodings(), two):
        keeps_all.setup(DataLoader(data, batch_size=4))
        keeps_all.train()
    assert keeps_all.current_step > 0


class Numbered(Dataset):
    """Encodings that say which dataset they are of."""

    def __init__(self, data, dataset_id):
        self.data, self.dataset_id = data, dataset_id

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {**self.data[index], "dataset_id": self.dataset_id}


def taught(seed):
    features = torch.full((4, 10, 20), float(seed))
    return DatasetCache(encodings(ONES), LuneFeatureCache(features, default_buckets()))


def test_samples_of_several_datasets_must_say_of_which_they_are(tmp_path):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path))
    cache = MultiSourceCache().add(taught(1), 0).add(taught(2), 5)
    mixed = ConcatDataset([encodings(ONES), encodings(ONES)])
    trainer.setup(DataLoader(mixed, batch_size=4), cache)
    with pytest.raises(InputError, match=r"no 'dataset_id'.*holds 2 datasets"):
        trainer.train()
    numbered = ConcatDataset([Numbered(encodings(ONES), 0), Numbered(encodings(ONES), 5)])
    trainer.setup(DataLoader(numbered, batch_size=8), cache)
    (item,) = trainer.steps(1)
    assert item.micro_batches[0].lune[:, 0, 0].tolist() == [1.0] * 4 + [2.0] * 4


def test_the_only_dataset_need_not_be_named_whatever_its_id(tmp_path):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path))
    trainer.setup(DataLoader(encodings(ONES), batch_size=4), MultiSourceCache().add(taught(3), 7))
    (item,) = trainer.steps(1)
    assert (item.micro_batches[0].lune == 3).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_model_trains_the_same_and_saves_plain_names(tmp_path):
    plain = make_trainer(tmp_path / "a")
    compiled = make_trainer(tmp_path / "b", compile_mode="default")
    for trainer in (plain, compiled):
        trainer.train()
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-4)
    assert compiled.ema.shadow.keys() == plain.model.state_dict().keys()
    compiled.save_checkpoint(str(tmp_path / "saved"))
    plain.load_checkpoint(str(tmp_path / "saved"))
