"""A run on caches that are still being built: what stands at which position."""

import tempfile
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.fixtures.trainers import settings, weights
from tests.fixtures.worlds import student_config
from tinyflux.cache.committed import UNFINISHED_NAME
from tinyflux.cache.config import MixSource
from tinyflux.cache.manifest import Manifest, Recipe
from tinyflux.cache.shards import SHARD_FOLDER, write_null_text, write_shard
from tinyflux.cache.store import LocalStore
from tinyflux.data.batches import StepSource
from tinyflux.data.growing import GrowingReader
from tinyflux.data.ledger import Ledger
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader, read_held_out
from tinyflux.errors import CacheError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.storage.folder import LocalFolder
from tinyflux.trainer.trainer import Trainer

BATCH, SEED, HELD_OUT = 4, 5, 0.3
SIZES = [5, 3, 7, 2, 6, 4]  # rows of the shards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards whose latents say which row it is, of one picture size or, every third, of another."""
    sizes = {}
    for name, other in (("one", (2, 2)), ("two", (2, 4))):
        folder, start, shards = tmp_path_factory.mktemp(name), 0, []
        store = LocalStore(folder)
        for number, count in enumerate(SIZES):
            rows = torch.arange(start, start + count)
            height, width = other if number % 3 == 1 else (2, 2)
            columns = {
                "latents": rows.half()[:, None, None, None].expand(-1, 4, height, width),
                "t5_embeds": torch.ones(count, 24, 16).half(),
                "clip_pooled": torch.ones(count, 16).half(),
            }
            keys = [f"{row:032x}" for row in rows.tolist()]
            columns = {column: values.contiguous() for column, values in columns.items()}
            shards.append(write_shard(store, f"{number:016x}", keys, columns, trim_text=True))
            start += count
        null_text = write_null_text(store, torch.zeros(24, 16), torch.zeros(16))
        sizes[name] = SimpleNamespace(folder=folder, shards=shards, null_text=null_text)
    return sizes


class Growing:
    """A cache in ``folder`` with the shards of ``made``, of which some are committed."""

    def __init__(self, folder, made):
        folder.mkdir()
        for name in (SHARD_FOLDER, made.null_text.path):
            (folder / name).symlink_to(made.folder / name)
        self.store, self.source, self._made = LocalStore(folder), MixSource(str(folder)), made

    def commit(self, count, finished=False):
        shards = tuple(self._made.shards[:count])
        rows = sum(shard.rows for shard in shards)
        manifest = Manifest(rows, Recipe(), shards, self._made.null_text, built=True)
        if not finished:
            self.store.write(UNFINISHED_NAME, manifest.to_json())
            return
        manifest.save(self.store)
        self.store.delete(UNFINISHED_NAME)

    def reader(self, **options):
        defaults = {"val_fraction": HELD_OUT, "batch_size": BATCH, "seed": SEED}
        return GrowingReader([self.source], **{**defaults, **options})


def rows_of(step):
    """Rows and positions of a step, in order."""
    return [
        (int(latents[0, 0, 0]), position)
        for batch in step.micro_batches
        for latents, position in zip(batch.latents, batch.positions.tolist(), strict=True)
    ]


def train(cache, reader, history):
    """The steps of so many passes; before each the cache has grown, at last it is finished."""
    found, steps = [], reader.steps()
    for number, count in enumerate(history):
        if number:
            cache.commit(count, finished=number + 1 == len(history))
        while not found or found[-1].epoch <= number:
            found.append(next(steps))
    return found


HISTORIES = st.lists(st.integers(1, len(SIZES)), min_size=2, max_size=5).map(sorted)
LAWS = hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@LAWS
@given(history=HISTORIES)
def test_each_pass_reads_every_row_that_was_committed_when_it_began(made, history):
    with tempfile.TemporaryDirectory() as folder:
        cache = Growing(Path(folder) / "cache", made["one"])
        cache.commit(history[0])
        reader = cache.reader()
        found = train(cache, reader, history)
        cache.commit(len(SIZES), finished=True)
        whole = CacheMixture([cache.source])
        held_out = set(np.flatnonzero(whole.held_out(HELD_OUT)).tolist())
        assert 0 < len(held_out) < len(whole)
        orders = []
        for number, count in enumerate(history):
            steps = [s for i, s in enumerate(found) if (found[i - 1].epoch if i else 0) == number]
            assert [step.epoch for step in steps] == [number] * (len(steps) - 1) + [number + 1]
            rows = [row for step in steps for row, _ in rows_of(step)]
            there = set(range(sum(SIZES[:count]))) - held_out
            # Whole steps: the last one may begin again.
            assert set(rows) == there
            assert len(rows) == -(-len(there) // BATCH) * BATCH
            assert sorted(rows[: len(there)]) == sorted(there)
            orders.append(rows)
        assert [p for step in found for _, p in rows_of(step)] == list(range(sum(map(len, orders))))
        again = [a == b for a, b in pairwise(orders) if len(a) > 2 * BATCH]
        assert not any(again)  # each pass is another shuffle


@LAWS
@given(
    history=HISTORIES, kind=st.sampled_from(["one", "two"]), world=st.integers(1, 3), data=st.data()
)
def test_a_killed_run_repeats_what_it_had_decided_on_any_number_of_workers(
    made, history, kind, world, data
):
    with tempfile.TemporaryDirectory() as folder:
        cache, run = Growing(Path(folder) / "cache", made[kind]), LocalFolder(Path(folder) / "run")
        cache.commit(history[0])
        found = train(cache, cache.reader(ledger=Ledger(run)), history)
        cache.commit(len(SIZES), finished=True)
        saved = data.draw(st.integers(0, len(found)), label="steps until the checkpoint")
        seen = found[saved - 1].samples_seen if saved else 0
        options = {"accumulation": 2}
        if saved:
            options["passes"] = found[saved - 1].passes
        readers = [
            cache.reader(ledger=Ledger(run), is_main=rank == 0, **options).steps(seen, rank, world)
            for rank in range(world)
        ]
        for before, *parts in zip(found[saved:], *readers, strict=False):
            assert [one for part in parts for one in rows_of(part)] == rows_of(before)
            assert {part.samples_seen for part in parts} == {before.samples_seen}
            assert {part.epoch for part in parts} == {before.epoch}
        # The checkpoint alone knows what was decided until it was written.
        if saved:
            alone = cache.reader(**options).steps(seen)
            decided = found[saved - 1].passes.decided
            for before, step in zip(found[saved:], alone, strict=False):
                if before.epoch >= decided:
                    break
                assert rows_of(step) == rows_of(before)


def test_the_list_is_closed_with_the_first_pass_after_the_manifest(made, tmp_path):
    cache, ledger = Growing(tmp_path / "cache", made["one"]), Ledger(LocalFolder(tmp_path / "run"))
    cache.commit(2)
    steps = cache.reader(ledger=ledger).steps()
    next(steps)
    cache.commit(3, finished=True)
    while next(steps).epoch < 1:
        pass
    next(steps)
    decided = ledger.load()
    assert decided.finished
    cache.commit(6, finished=True)
    while next(steps).epoch < 4:
        pass
    assert ledger.load() == decided
    assert [span.counts for span in decided.spans] == [(2,), (3,)]


def test_held_out_samples_stay_held_out_and_the_same(made, tmp_path):
    cache, ledger = Growing(tmp_path / "cache", made["one"]), Ledger(LocalFolder(tmp_path / "run"))
    cache.commit(3)
    first = cache.reader(ledger=ledger).first
    keys = read_held_out(first, first.held_out(HELD_OUT)).keys
    assert sum(map(len, keys)) > 0
    cache.commit(6, finished=True)
    later = cache.reader(ledger=ledger).first
    assert read_held_out(later, later.held_out(HELD_OUT)).keys == keys
    whole = CacheMixture([cache.source])
    assert (whole.held_out(HELD_OUT)[: len(first)] == first.held_out(HELD_OUT)).all()


def test_a_mixture_grows_by_either_cache(made, tmp_path):
    one, two = (Growing(tmp_path / name, made["one"]) for name in ("a", "b"))
    one.commit(1)
    two.commit(2, finished=True)
    sources = [one.source, MixSource(two.source.path, 2.0)]
    reader = GrowingReader(sources, 0.0, BATCH, seed=SEED)
    steps = reader.steps()
    passes = [next(steps).passes]
    one.commit(3, finished=True)
    while passes[-1].decided < 2:
        passes.append(next(steps).passes)
    assert [span.counts for span in passes[-1].spans] == [(1, 2), (3, 2)]
    assert passes[-1].finished
    with pytest.raises(CacheError, match="the run began on 2 caches, not 1"):
        one.reader(passes=passes[-1])


def test_too_few_rows_are_refused_until_the_build_has_ended(made, tmp_path):
    cache = Growing(tmp_path / "cache", made["one"])
    with pytest.raises(CacheError, match="there is no cache at"):
        cache.reader()
    cache.store.write("build.json", b"{}")
    with pytest.raises(CacheError, match="has no whole shard yet: start again"):
        cache.reader()
    cache.commit(2)
    with pytest.raises(CacheError, match=r"hold 8 rows so far, and trainer\.start_at_rows is 9"):
        cache.reader(start_at_rows=9)
    cache.reader(start_at_rows=8)
    cache.commit(2, finished=True)
    assert cache.reader(start_at_rows=9).passes.finished


def test_shards_that_are_gone_end_no_run_but_none_goes_on_from_them(made, tmp_path, caplog):
    cache, ledger = Growing(tmp_path / "cache", made["one"]), Ledger(LocalFolder(tmp_path / "run"))
    cache.commit(2)
    steps = cache.reader(ledger=ledger).steps()
    next(steps)
    cache.store.delete(UNFINISHED_NAME)  # as by a build with other models
    cache.store.write("build.json", b"{}")
    last = next(step for step in steps if step.epoch == 3)
    assert "the run goes on with the shards that it has" in caplog.text
    assert [span.counts for span in last.passes.spans] == [(2,)]
    cache.commit(1)
    with pytest.raises(CacheError, match="does not list 1 of the 2 shards that the run reads"):
        cache.reader(ledger=ledger)


def test_the_plain_trainer_takes_new_shards_in_and_goes_on_bit_for_bit(made, tmp_path):
    def trainer(name, cache, **options):
        torch.manual_seed(0)
        config = settings(
            tmp_path / name, seed=SEED, batch_size=BATCH, total_steps=99, text_dropout=0.5,
            enable_lune=False, enable_sol=False, lr_scheduler="constant",
        )  # fmt: skip
        reader = cache.reader(**options)
        assert isinstance(reader, StepSource)
        made_trainer = Trainer(TinyFluxDeep(student_config()), config)
        made_trainer.setup(reader)
        return made_trainer

    cache, run = Growing(tmp_path / "cache", made["one"]), LocalFolder(tmp_path / "run")
    cache.commit(2)
    straight = trainer("a", cache, ledger=Ledger(run))
    straight.train(1)
    straight.save_checkpoint(str(tmp_path / "early"))
    cache.commit(4)
    straight.train(1)
    cache.commit(6, finished=True)
    straight.train(1)

    second = trainer("b", cache, ledger=Ledger(run))
    second.load_checkpoint(str(tmp_path / "early"))
    second.train(2)
    assert second.current_step == straight.current_step
    assert torch.equal(weights(second), weights(straight))

    other = trainer("c", cache)  # it has decided on all six shards
    other.load_checkpoint(str(tmp_path / "early"))
    with pytest.raises(CacheError, match="make it with the ledger of the run"):
        other.train(1)
    data = CacheMixture([cache.source])
    plain = Trainer(TinyFluxDeep(student_config()), straight.config)
    plain.setup(StepReader(data, data.held_out(HELD_OUT), BATCH, seed=SEED))
    plain.train(1)
    plain.save_checkpoint(str(tmp_path / "plain"))
    other = trainer("d", cache)
    other.load_checkpoint(str(tmp_path / "plain"))
    with pytest.raises(CacheError, match="the run began on finished caches"):
        other.train(1)


def test_runs_on_finished_caches_have_the_order_that_they_had(made, tmp_path):
    cache = Growing(tmp_path / "cache", made["one"])
    cache.commit(6, finished=True)
    data = CacheMixture([cache.source])
    steps = islice(StepReader(data, data.held_out(0.0), BATCH, seed=SEED).steps(), 3)
    assert [row for step in steps for row, _ in rows_of(step)] == GOLDEN_ORDER


# Of the first three steps, as they were before caches could grow.
GOLDEN_ORDER = [11, 25, 10, 26, 5, 13, 17, 2, 1, 23, 21, 12]
