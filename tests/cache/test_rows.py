"""The records of the lists on disk, and the columns that they are there."""

import pyarrow.parquet as pq
from PIL import Image

from tinyflux.cache.config import DataConfig
from tinyflux.cache.index import index_path, read_index, write_index
from tinyflux.cache.partition import plan_shards, read_rows
from tinyflux.cache.rejected import Rejected
from tinyflux.cache.rows import IndexedPicture
from tinyflux.cache.sources import list_splits
from tinyflux.cache.store import LocalStore

# What caches that exist have in their files.
ROW_COLUMNS = [
    "key", "picture", "mask_picture", "caption", "source", "locator", "mask_locator", "width",
    "height",
]  # fmt: skip
INDEX_COLUMNS = [
    "source", "locator", "mask_locator", "captions", "picture", "mask_picture", "width", "height",
    "reason",
]  # fmt: skip


def picture(number, captions=("one", "two"), reason=""):
    return IndexedPicture(
        source=f"{number}.png",
        locator=f"at {number}",
        mask_locator="",
        captions=list(captions),
        picture=f"{number:032x}",
        width=32,
        height=32,
        reason=reason,
    )


def test_a_picture_has_a_row_for_each_caption():
    first, second = picture(7).rows((32, 32))
    assert (first.caption, second.caption) == ("one", "two")
    assert first.key != second.key
    assert first.picture == second.picture == picture(7).picture
    assert (first.source, first.locator) == ("7.png", "at 7")


def test_rows_come_back_from_their_file_in_its_columns(tmp_path):
    (tmp_path / "shards").mkdir()
    store, rejected = LocalStore(tmp_path), Rejected()
    config, broken = DataConfig("anywhere", height=32, width=32), picture(3, reason="broken")
    index = [[picture(1), picture(2)], [broken, picture(2, ("two", "three"))]]
    (shard,) = plan_shards(store, config, index, rows_per_shard=100, rejected=rejected)
    assert read_rows(store, shard.file.path) == [
        *picture(1).rows((32, 32)),
        *picture(2).rows((32, 32)),
        *picture(2, ["three"]).rows((32, 32)),
    ]
    assert rejected.rows == [("3.png", "broken")]
    assert (rejected.seen, rejected.duplicates) == (4, 1)
    assert pq.read_schema(tmp_path / shard.file.path).names == ROW_COLUMNS


def test_indexed_pictures_come_back_from_their_file_in_its_columns(tmp_path):
    pictures, dataset = tmp_path / "pictures", tmp_path / "cache"
    pictures.mkdir()
    (dataset / "index").mkdir(parents=True)
    Image.new("RGB", (40, 32), "red").save(pictures / "a.png")
    (pictures / "a.txt").write_text("a red one")
    (pictures / "b.png").write_bytes(b"no picture")
    (pictures / "b.txt").write_text("a broken one")
    config, store = DataConfig(str(pictures)), LocalStore(dataset)
    (split,) = list_splits(config)
    write_index(store, config, split)
    sound, broken = read_index(store, config, split)
    assert (sound.width, sound.height, sound.captions) == (40, 32, ["a red one"])
    assert sound.picture
    assert not sound.reason
    assert "b.png" in broken.reason
    assert not broken.picture
    assert pq.read_schema(dataset / index_path(config, split)).names == INDEX_COLUMNS
