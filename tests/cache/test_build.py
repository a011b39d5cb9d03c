"""A cache build without Ray: what is computed, what is kept, and what is refused.

Slow: the kills at the end, each of a process that begins to build.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.fixtures.caches import (
    CAPTIONS,
    assert_same,
    build_configs,
    changed,
    make,
    rows_by_key,
)
from tests.fixtures.waiting import PATIENCE, kills
from tests.fixtures.worlds import make_world, write_pictures
from tinyflux.cache.build import build
from tinyflux.cache.claim import claim
from tinyflux.cache.config import MixSource
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.extract import Extractor
from tinyflux.cache.inspect import describe
from tinyflux.cache.manifest import CutCaptions, Manifest
from tinyflux.cache.receipts import all_receipts
from tinyflux.cache.runner import LocalRunner
from tinyflux.cache.verify import verify
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader
from tinyflux.errors import CacheError, InputError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.cache_experts import DatasetCache, EncodingCache
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.step import training_loss

GROUPS = ("latents", "text", "lune", "sol")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def configs(tmp_path, world):
    """Twelve pictures in shards of at most four."""
    return build_configs(tmp_path, world, CAPTIONS, rows_per_shard=4)


def computed(configs):
    """Builds, and counts the rows that went through models, by group."""
    before = {(r.shard, r.group, r.fingerprint) for r in all_receipts(configs.store)}
    make(configs)
    new = [r for r in all_receipts(configs.store)
           if (r.shard, r.group, r.fingerprint) not in before]  # fmt: skip
    return {group: sum(r.computed for r in new if r.group == group) for group in GROUPS}


NOTHING = dict.fromkeys(GROUPS, 0)


def test_receipts_on_disk_call_the_fingerprint_maker(configs):
    manifest = make(configs)
    wanted = {group: info.fingerprint for group, info in manifest.recipe.groups.items()}
    for path in configs.store.directory.glob("receipts/*.json"):
        record = json.loads(path.read_text())
        assert record["maker"] == wanted[record["group"]]
        assert "fingerprint" not in record


def test_a_finished_cache_is_left_as_it_is(configs):
    manifest = make(configs)
    assert manifest.rows == len(CAPTIONS)

    def stamps():  # but of the lock, which every job takes
        return {path: path.stat().st_mtime_ns for path in configs.store.directory.rglob("*")
                if path.name not in (".build.json.lock", ".build.json.holder")}  # fmt: skip

    before = stamps()
    assert make(configs) == manifest
    assert stamps() == before


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (5, 2), (100, 12)])
def test_features_do_not_depend_on_shards_or_batches(configs, rows, batch):
    make(configs)
    other = changed(configs, cache={"path": f"{configs.cache.path}-other",
                                    "rows_per_shard": rows, "batch_size": batch})  # fmt: skip
    make(other)
    assert_same(other.store.directory, configs.store.directory, tolerance=2e-3)


def test_the_library_without_a_job_computes_the_same(configs):
    make(configs)
    folder = Path(configs.data.folder)
    images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    cache = DatasetCache.build(configs.zoo.build(configs.model), images, CAPTIONS)
    dataset = CachedDataset(configs.store.directory)
    order = sorted(range(len(dataset)), key=dataset.sources().__getitem__)
    rows = dataset.read(order)
    for name in ("latents", "t5_embeds", "clip_pooled"):
        torch.testing.assert_close(
            cache.encodings.columns()[name].float(), rows[name], rtol=2e-3, atol=2e-3
        )
    # The noise follows the picture's bytes there and its pixels here, so the teachers' differ.
    assert cache.lune.features.shape == rows["lune"].shape


def test_other_shards_are_filled_from_what_is_there(configs):
    make(configs)
    assert computed(changed(configs, cache={"rows_per_shard": 7})) == NOTHING


def test_another_text_encoder_recomputes_text_alone(configs, tmp_path):
    make(configs)
    before = rows_by_key(configs.store.directory)
    other = make_world(tmp_path / "other", seed=1)
    new = changed(configs, zoo={"t5_repo": str(other / "t5")})
    assert computed(new) == {**NOTHING, "text": len(CAPTIONS)}
    for key, (_, tensors) in rows_by_key(configs.store.directory).items():
        assert not torch.equal(tensors["t5_embeds"], before[key][1]["t5_embeds"])
        assert torch.equal(tensors["lune"], before[key][1]["lune"])
    # The first encoder's files are still there.
    assert computed(configs) == NOTHING


def test_weights_that_were_trained_on_at_the_same_path_are_noticed(configs, tmp_path):
    world = shutil.copytree(configs.zoo.experts_repo, tmp_path / "copy")
    mine = changed(configs, zoo={"experts_repo": str(world)})
    make(mine)
    other = make_world(tmp_path / "other", seed=1)
    shutil.rmtree(world / "lune")
    shutil.copytree(other / "lune", world / "lune")
    assert computed(mine) == {**NOTHING, "lune": len(CAPTIONS)}


def test_a_teacher_is_added_to_a_finished_cache(configs):
    make(changed(configs, cache={"extract_sol": False}))
    assert computed(configs) == {**NOTHING, "sol": len(CAPTIONS)}
    assert "sol_stats" in CachedDataset(configs.store.directory).read([0])


def test_an_edited_picture_recomputes_its_own_row(configs):
    make(configs)
    before = rows_by_key(configs.store.directory)
    write_pictures(Path(configs.data.folder) / "tmp", ["x"], seed=9)
    os.replace(Path(configs.data.folder) / "tmp/000.png", Path(configs.data.folder) / "005.png")
    shutil.rmtree(Path(configs.data.folder) / "tmp")
    once = dict.fromkeys(("latents", "lune", "sol"), 1)
    assert computed(configs) == {**NOTHING, **once}
    after = rows_by_key(configs.store.directory)
    assert len(before.keys() & after.keys()) == len(CAPTIONS) - 1
    for key in before.keys() & after.keys():
        for name, tensor in before[key][1].items():
            assert torch.equal(after[key][1][name], tensor)
    fresh = changed(configs, cache={"path": f"{configs.cache.path}-fresh"})
    make(fresh)
    assert_same(configs.store.directory, fresh.store.directory, tolerance=2e-3)


def test_an_edited_caption_recomputes_what_saw_it(configs):
    make(configs)
    (Path(configs.data.folder) / "005.txt").write_text("yellow circle")
    assert computed(configs) == {"latents": 0, "text": 1, "lune": 1, "sol": 1}


def test_renamed_added_and_removed_pictures(configs):
    make(configs)
    folder = Path(configs.data.folder)
    for path in list(folder.iterdir()):
        path.rename(folder / f"z{path.name}" if path.stem < "004" else path)
    assert computed(configs) == NOTHING
    assert "z000.png" in CachedDataset(configs.store.directory).sources()
    for name in ("z001.png", "z001.txt", "007.png", "007.txt"):
        (folder / name).unlink()
    assert computed(configs) == NOTHING
    assert len(CachedDataset(configs.store.directory)) == len(CAPTIONS) - 2
    write_pictures(folder / "more", ["new one", "another one"], seed=11)
    assert computed(configs) == dict.fromkeys(GROUPS, 2)


def test_a_sample_that_is_listed_twice_is_kept_once(configs, capsys):
    folder = Path(configs.data.folder)
    shutil.copy(folder / "003.png", folder / "copy.png")
    shutil.copy(folder / "003.txt", folder / "copy.txt")
    assert make(configs).rows == len(CAPTIONS)
    assert "1 samples are listed twice" in capsys.readouterr().out


def test_pictures_of_several_sizes_and_a_new_size(configs):
    folder = Path(configs.data.folder)
    write_pictures(folder / "wide", CAPTIONS[:3], size=(32, 16), seed=5)
    write_pictures(folder / "tall", CAPTIONS[:2], size=(16, 32), seed=6)
    bucket = changed(configs, data={"resize": "bucket", "areas": (16,), "step": 4,
                                    "max_aspect": 2.0})  # fmt: skip
    make(bucket)
    dataset = CachedDataset(bucket.store.directory)
    grids = {grid for grid, _ in dataset.grids()}
    assert len(grids) == 3
    assert (4, 4) in grids
    for _, run in dataset.grids():
        columns = dataset.read(run)
        assert torch.isfinite(columns["sol_spatial"]).all()
    with pytest.raises(CacheError, match="several sizes"):
        dataset.read(range(len(dataset)))
    # A larger area takes the larger pictures and leaves the others as they are.
    larger = changed(bucket, data={"areas": (16, 22)})
    found = computed(larger)
    assert found == {"latents": 5, "text": 0, "lune": 5, "sol": 5}


def test_a_student_trains_on_pictures_of_several_sizes(configs):
    folder = Path(configs.data.folder)
    write_pictures(folder / "wide", CAPTIONS[:3], size=(32, 16), seed=5)
    mixed = changed(configs, data={"resize": "bucket", "areas": (16,), "step": 4})
    make(mixed)
    dataset = CacheMixture([MixSource(str(mixed.store.directory))])
    model = TinyFluxDeep(configs.model)
    dataset.check(configs.model, True, True)
    config = TrainerConfig(
        batch_size=3, gradient_accumulation=1, val_fraction=0.0, dtype=torch.float32
    )
    steps = StepReader(dataset, dataset.held_out(0.0), config.batch_size).steps()
    grids = set()
    for _, step in zip(range(5), steps, strict=False):
        (batch,) = step.micro_batches
        grids.add(batch.grid)
        loss = training_loss(model, batch, config, 0, None, dataset.t_buckets)
        loss.total.backward()
        assert torch.isfinite(loss.total)
    assert grids == {(4, 4), (3, 5)}


def test_masks_are_cached_beside_the_latents(configs):
    folder = Path(configs.data.folder)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder / "003.mask.png")
    assert make(changed(configs, data={"mask_key": "mask"})).rows == len(CAPTIONS)
    dataset = CachedDataset(configs.store.directory)
    masks = dict(zip(dataset.sources(), dataset.read(range(12))["mask"], strict=True))
    assert masks["003.png"].tolist() == [[1, 1, 0, 0]] * 4
    assert masks["004.png"].tolist() == [[1, 1, 1, 1]] * 4


def test_broken_pictures_are_left_out_up_to_a_share(configs):
    folder = Path(configs.data.folder)
    (folder / "002.png").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"1 of 12 pictures .*'002\.png' is not a picture"):
        make(configs)
    assert not (configs.store.directory / "manifest.json").exists()
    allowed = changed(configs, data={"max_rejected": 0.1})
    manifest = make(allowed)
    assert manifest.rows == len(CAPTIONS) - 1
    table = pq.read_table(configs.store.directory / manifest.rejected.path).to_pylist()
    assert [row["source"] for row in table] == ["002.png"]
    assert "is not a picture" in table[0]["reason"]
    (folder / "003.png").write_bytes(b"")
    with pytest.raises(InputError, match="2 of 12"):
        make(allowed)


def test_a_picture_that_changes_meanwhile_ends_the_job_and_is_found_again(configs):
    path = Path(configs.data.folder) / "004.png"
    whole = path.read_bytes()

    class Meddler(LocalRunner):
        def encode(self, tasks):
            path.unlink()
            return super().encode(tasks)

    with pytest.raises(InputError, match=r"'004\.png' was changed or removed while"):
        build(configs, Meddler(configs))
    path.write_bytes(whole)
    assert make(configs).rows == len(CAPTIONS)


def test_features_that_are_not_finite_and_long_captions_are_rejected(configs, monkeypatch):
    (Path(configs.data.folder) / "001.txt").write_text("red " * 100)
    configs = changed(configs, data={"long_captions": "reject"})
    teachers = Extractor.teachers
    victim = Path(configs.data.folder, "007.txt").read_text()

    def overflow(self, keys, latents, captions, names=None):
        found = teachers(self, keys, latents, captions, names)
        for row, caption in enumerate(captions):
            if caption == victim:
                found["lune"][row, 3] = float("inf")
        return found

    monkeypatch.setattr(Extractor, "teachers", overflow)
    allowed = changed(configs, data={"max_rejected": 0.2})
    manifest = make(allowed)
    assert manifest.rows == len(CAPTIONS) - 2
    table = pq.read_table(configs.store.directory / manifest.rejected.path).to_pylist()
    reasons = {row["source"]: row["reason"] for row in table}
    assert reasons.keys() == {"001.png", "007.png"}
    assert reasons["001.png"].startswith(
        "its caption has 70 tokens more than CLIP reads and 277 more than T5 does "
    )
    assert reasons["007.png"] == "lune is not finite in float16"
    dataset = CachedDataset(configs.store.directory)
    assert victim not in dataset.captions()
    assert torch.isfinite(dataset.read(range(len(dataset)))["lune"]).all()
    with pytest.raises(InputError, match="2 of 12 pictures"):
        make(configs)


def test_a_foreign_folder_with_two_long_captions_is_built_whole(configs, tmp_path, capsys):
    """19 T5 tokens where a student reads 16 once ended the job of 200 pictures."""
    captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(200)]
    captions[7] = captions[151] = "red " * 6
    write_pictures(tmp_path / "foreign", captions, size=(8, 8))
    foreign = changed(
        configs, data={"folder": str(tmp_path / "foreign"), "width": 8, "height": 8},
        cache={"extract_lune": False, "extract_sol": False, "rows_per_shard": 64,
               "batch_size": 32},
        model={"max_text_length": 16},
    )  # fmt: skip
    zoo = foreign.zoo.build(foreign.model)
    assert zoo.t5_token_counts(captions).gt(16).sum() == 2
    assert zoo.t5_token_counts([captions[7]]).item() == 19
    manifest = make(foreign)
    assert manifest.rows == 200
    assert manifest.rejected is None
    assert manifest.cut_captions == CutCaptions(clip=0, t5=2)
    said = "captions cut to what the text encoders read: 0 for CLIP, 2 for T5"
    assert f"cache: {said} (data.long_captions: reject leaves them out)" in capsys.readouterr().out
    assert said in describe(Manifest.load(foreign.store))
    make(foreign)
    assert said in capsys.readouterr().out
    dataset = CachedDataset(foreign.store.directory)
    (row, _) = [
        at for at, caption in enumerate(dataset.captions()) if caption == "red " * 5 + "red"
    ]
    wanted, _ = zoo.encode_prompts_batched(["red red red red red red"])
    torch.testing.assert_close(dataset.read([row])["t5_embeds"], wanted, rtol=2e-3, atol=2e-3)
    with pytest.raises(InputError, match=r"2 of 200 pictures .* 3 more than T5 does"):
        make(changed(foreign, data={"long_captions": "reject"}))


def test_what_to_do_with_long_captions_can_change_and_computes_nothing(configs):
    for name in ("001", "005"):
        (Path(configs.data.folder) / f"{name}.txt").write_text("red " * 100)
    reject = changed(configs, data={"long_captions": "reject", "max_rejected": 0.2})
    straight = changed(configs, cache={"path": f"{configs.cache.path}-straight"})
    make(reject)
    rejected = rows_by_key(configs.store.directory)
    assert len(rejected) == len(CAPTIONS) - 2
    assert Manifest.load(configs.store).cut_captions is None
    assert verify(configs.store) == []
    assert computed(configs) == NOTHING
    manifest = Manifest.load(configs.store)
    assert (manifest.rows, manifest.rejected) == (len(CAPTIONS), None)
    assert manifest.cut_captions == CutCaptions(clip=2, t5=2)
    make(straight)
    assert_same(configs.store.directory, straight.store.directory, tolerance=2e-3)
    assert computed(reject) == NOTHING
    assert rows_by_key(configs.store.directory).keys() == rejected.keys()


def test_captions_that_an_earlier_version_rejected_come_back(configs):
    (Path(configs.data.folder) / "001.txt").write_text("red " * 100)
    straight = changed(configs, cache={"path": f"{configs.cache.path}-straight"})
    make(straight)
    make(configs)
    for path in (configs.store.directory / "receipts").glob("*.json"):
        receipt = json.loads(path.read_text())
        (rows,) = configs.store.directory.glob(f"shards/{receipt['shard']}.rows.*")
        captions = pq.read_table(rows)["caption"].to_pylist()
        del receipt["cut"]
        reason = "the prompt 'red red ...' has 102 CLIP tokens, the limit is 32: shorten it"
        receipt["rejected"] = [[n, reason] for n, c in enumerate(captions) if len(c) > 100]
        path.write_text(json.dumps(receipt))
    work = {(r.shard, r.group): r.computed for r in all_receipts(configs.store) if r.rejected}
    assert len(work) == 4
    make(configs)
    after = {(r.shard, r.group): r.computed for r in all_receipts(configs.store)}
    assert {after[what] for what in work} == {1}
    assert_same(configs.store.directory, straight.store.directory, tolerance=2e-3)


def test_what_was_cut_is_known_after_a_kill_and_where_rows_are_reused(configs, processes):
    for index, name in enumerate(("001", "005", "009")):
        (Path(configs.data.folder) / f"{name}.txt").write_text("red " * (50 + index))
    process = start(processes, configs)
    receipts = configs.store.directory / "receipts"
    while process.is_alive() and not list(receipts.glob("*.text.*.json")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (configs.store.directory / "manifest.json").exists()
    assert list(receipts.glob("*.text.*.json"))
    assert make(configs).cut_captions == CutCaptions(clip=3, t5=3)
    other = changed(configs, cache={"rows_per_shard": 7})
    assert computed(other) == NOTHING
    assert Manifest.load(other.store).cut_captions == CutCaptions(clip=3, t5=3)


def test_a_cache_in_which_nothing_is_cut_keeps_its_digest(configs):
    make(configs)
    assert "cut_captions" not in (configs.store.directory / "manifest.json").read_text()


def test_links_out_of_the_folder_are_listed_with_what_is_rejected(configs, tmp_path):
    (tmp_path / "secret.txt").write_text("the machine's secret")
    caption = Path(configs.data.folder) / "004.txt"
    caption.unlink()
    caption.symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"1 of 12 .* '004.txt' is a link that leads out"):
        make(configs)
    manifest = make(changed(configs, data={"max_rejected": 0.1}))
    assert manifest.rows == len(CAPTIONS) - 1
    assert "the machine's secret" not in CachedDataset(configs.store.directory).captions()
    files = [path for path in configs.store.directory.rglob("*") if path.is_file()]
    assert not [path for path in files if b"machine's secret" in path.read_bytes()]
    followed = make(changed(configs, data={"follow_links": True}))
    assert followed.rows == len(CAPTIONS)
    assert "the machine's secret" in CachedDataset(configs.store.directory).captions()


def test_an_actor_out_of_memory_halves_its_batch(configs, monkeypatch, capsys):
    make(configs)
    encode = type(configs.zoo.build(configs.model)).encode_images_batched
    sizes = []

    def limited(self, images, batch_size=32):
        sizes.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, images, batch_size)

    monkeypatch.setattr("tinyflux.model.zoo.ModelZoo.encode_images_batched", limited)
    other = changed(configs, cache={"path": f"{configs.cache.path}-small", "batch_size": 4})
    make(other)
    assert sizes[:3] == [4, 2, 1]
    assert set(sizes[3:]) == {1}
    assert "going on with batches of 1" in capsys.readouterr().out
    assert_same(other.store.directory, configs.store.directory, tolerance=2e-3)

    def never(self, images, batch_size=32):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tinyflux.model.zoo.ModelZoo.encode_images_batched", never)
    with pytest.raises(CacheError, match="does not hold a single picture"):
        make(changed(configs, cache={"path": f"{configs.cache.path}-none"}))


def test_other_peoples_directories_and_two_jobs_at_once_are_refused(configs, tmp_path):
    (tmp_path / "home" / "work").mkdir(parents=True)
    precious = tmp_path / "home" / "work" / ".mine.tmp"
    precious.write_text("not yours")
    with pytest.raises(CacheError, match="holds other files and no cache"):
        make(changed(configs, cache={"path": str(tmp_path / "home")}))
    assert precious.exists()
    EncodingCache(torch.ones(2, 4, 4, 4), torch.ones(2, 24, 16), torch.ones(2, 16)).save(
        str(tmp_path / "memory")
    )
    with pytest.raises(CacheError, match="no build job made"):
        make(changed(configs, cache={"path": str(tmp_path / "memory")}))
    me = rf"another job is working .* \(process {os.getpid()} on "
    with claim(configs.store), pytest.raises(CacheError, match=me):
        make(configs)
    make(configs)


def run(configs, started, limit):
    """A whole build in a process of its own; its exit code is 2 after a user's error."""
    if limit:  # bytes that a file may have
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    started.set()
    try:
        make(configs)
    except CacheError as error:
        Path(f"{configs.cache.path}.error").write_text(str(error)[:2000])
        sys.exit(2)


@pytest.fixture(scope="module")
def processes():
    """Forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cache.test_build", "diffusers", "transformers"])
    return context


def start(processes, configs, limit=0):
    started = processes.Event()
    process = processes.Process(target=run, args=(configs, started, limit))
    process.start()
    assert started.wait(PATIENCE)
    return process


def finish(process):
    process.join(PATIENCE)
    code = process.exitcode
    process.close()
    return code


def test_a_store_that_refuses_writes_ends_with_a_sentence_and_resumes(configs, processes):
    assert finish(start(processes, configs, limit=3000)) == 2
    output = Path(f"{configs.cache.path}.error").read_text()
    assert "cannot be written" in output
    assert not (configs.store.directory / "manifest.json").exists()
    assert not list(configs.store.directory.rglob(".*.tmp"))
    make(configs)
    fresh = changed(configs, cache={"path": f"{configs.cache.path}-fresh"})
    make(fresh)
    assert_same(configs.store.directory, fresh.store.directory)


@pytest.mark.slow
@pytest.mark.fault
def test_kills_at_random_moments_leave_the_same_dataset(configs, processes):
    """SIGKILL while files are being made and written, again and again, then one run to the end."""
    straight = changed(configs, cache={"path": f"{configs.cache.path}-straight"})
    process = start(processes, straight)
    begun = time.monotonic()
    assert finish(process) == 0
    length = time.monotonic() - begun
    dice = random.Random(0)
    killed, states = 0, []
    while killed < kills(8):
        # All receipts gone now and then, so that there is always something to kill.
        if not dice.randrange(4):
            for path in sorted(configs.store.directory.glob("receipts/*.json"))[::2]:
                path.unlink()
        before = len(list(configs.store.directory.glob("receipts/*.json")))
        process = start(processes, configs)
        time.sleep(dice.uniform(0, length))
        if process.is_alive():
            process.kill()
            killed += 1
        finish(process)
        states.append(len(list(configs.store.directory.glob("receipts/*.json"))) - before)
    assert min(states) >= 0  # nothing that was committed is lost
    assert max(states) > 0
    assert finish(start(processes, configs)) == 0
    assert_same(configs.store.directory, straight.store.directory)
    assert (
        CachedDataset(configs.store.directory).keys()
        == CachedDataset(straight.store.directory).keys()
    )
