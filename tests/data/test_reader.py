"""The plain trainer reads a cache in the order of a run's workers, position by position."""

from itertools import islice

import numpy as np
import pytest
import torch

from tests.fixtures.students import make_batch
from tests.fixtures.trainers import Encodings, Features, settings, weights
from tests.fixtures.worlds import student_config
from tinyflux.cache.schema import GROUPS
from tinyflux.data.batches import StepSource
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader, read_held_out
from tinyflux.errors import InputError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.trainer import Trainer

BATCH, ACCUMULATION, SEED = 6, 2, 11


class NotedMixture(CacheMixture):
    """Notes the keys of the rows that are read, in the order of reading."""

    def __init__(self, sources):
        super().__init__(sources)
        everything = np.ones(len(self), bool)
        self.all_keys = {row: key for key, row in self.smallest_keys(everything, len(self))}
        self.read_keys = []

    def read(self, indices, as_stored=False, groups=tuple(GROUPS), draws=None):
        self.read_keys += [self.all_keys[row] for row in indices]
        return super().read(indices, as_stored, groups, draws)


def reader_of(data, fraction=0.2):
    return StepReader(data, data.held_out(fraction), BATCH, ACCUMULATION, SEED)


def by_position(steps, data):
    """The key and all tensors of each sample of ``steps``, by its position in the run."""
    data.read_keys.clear()
    found = {}
    for step in steps:
        keys = iter(data.read_keys)
        for batch in step.micro_batches:
            for row, position in enumerate(batch.positions.tolist()):
                assert position not in found
                tensors = {
                    name: tensor[row] for name, tensor in vars(batch).items() if tensor is not None
                }
                found[position] = next(keys), tensors
        assert not list(keys)
        data.read_keys.clear()
    return found


def make_trainer(folder, reader, **changes):
    torch.manual_seed(0)
    config = settings(folder, seed=SEED, batch_size=BATCH, **changes)
    trainer = Trainer(TinyFluxDeep(student_config()), config)
    trainer.setup(reader)
    return trainer


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_plain_trainer_has_the_sample_of_the_workers_at_every_position(caches, world, tmp_path):
    data = NotedMixture(caches)
    trainer = make_trainer(tmp_path, reader_of(data))
    alone = by_position(trainer.steps(epochs=5), data)
    count = len(alone) // BATCH
    assert len(alone) == count * BATCH >= 5 * (~data.held_out(0.2)).sum()
    together = {}
    for rank in range(world):
        steps = reader_of(data).steps(0, rank, world)
        together.update(by_position(islice(steps, count), data))
    assert together.keys() == alone.keys() == set(range(len(alone)))
    for position, (key, tensors) in alone.items():
        other_key, others = together[position]
        assert key == other_key, f"position {position}"
        for name in tensors.keys() & others.keys():
            assert torch.equal(tensors[name], others[name])
        # A worker whose part is of the cache without teachers has no columns for them.
        for name in tensors.keys() ^ others.keys():
            teacher = name.split("_")[0]
            assert not (tensors | others)[f"{teacher}_mask"]


def test_the_plain_trainer_counts_the_passes_over_a_cache(caches, tmp_path):
    data = CacheMixture(caches[:1])
    trainer = make_trainer(tmp_path, reader_of(data, 0.0))
    for epochs in (1, 2, 1):
        trainer.train(epochs)
    assert trainer.current_step * BATCH == 4 * len(data)


def test_a_plain_run_on_a_cache_that_is_stopped_ends_as_one_that_is_not(caches, tmp_path):
    data = CacheMixture(caches)
    changes = {"lr_scheduler": "constant", "val_fraction": 0.2}
    straight = make_trainer(tmp_path / "a", reader_of(data), total_steps=7, **changes)
    straight.train(99)
    first = make_trainer(tmp_path / "b", reader_of(data), total_steps=3, **changes)
    first.train(99)
    first.save_checkpoint(str(tmp_path / "checkpoint"))
    second = make_trainer(tmp_path / "b", reader_of(data), total_steps=7, **changes)
    second.load_checkpoint(str(tmp_path / "checkpoint"))
    second.train(99)
    assert second.current_step == straight.current_step == 7
    assert torch.equal(weights(second), weights(straight))


def test_a_plain_run_takes_null_text_times_and_sols_units_from_its_cache(caches, tmp_path):
    data = CacheMixture(caches)
    torch.manual_seed(0)
    model = TinyFluxDeep(student_config(sol_standardize=True))
    trainer = Trainer(model, settings(tmp_path, total_steps=2, validate_every=2, text_dropout=0.5))
    reader = reader_of(data)
    trainer.setup(reader, held_out=read_held_out(data, data.held_out(0.2)))
    assert model.sol_units.measured
    assert torch.equal(trainer.loop.t_buckets, data.t_buckets)
    assert all(map(torch.equal, trainer.loop.null_text, data.null_text))
    trainer.train()
    assert trainer.current_step == 2


def test_a_reader_with_a_cache_beside_it_is_refused(caches, tmp_path):
    reader = reader_of(CacheMixture(caches))
    assert isinstance(reader, StepSource)
    trainer = Trainer(TinyFluxDeep(student_config()), settings(tmp_path))
    with pytest.raises(InputError, match=r"StepReader.*leave the cache out"):
        trainer.setup(reader, Features(make_batch(3)))
    assert not isinstance(Encodings(), StepSource)
