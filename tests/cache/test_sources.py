"""Pictures and captions as their sources have them: every format, every mode, every mischief."""

import io
import json
import math
import os
import struct
import tarfile
import uuid
import zlib
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs

from tests.fixtures.sources import (
    CLEAN,
    FORMATS,
    MASK,
    PICTURES,
    as_metadata_jsonl,
    as_parquet,
    as_tar,
    as_text_files,
    encoded,
)
from tinyflux.cache.config import DataConfig
from tinyflux.cache.sources import (
    choose_size,
    decode_mask,
    decode_picture,
    filesystem,
    fit_mask,
    fit_picture,
    list_splits,
    open_pictures,
    read_split,
    size_buckets,
)
from tinyflux.cache.sources.splits import SourceSplit
from tinyflux.errors import ConfigError, InputError

LIMIT = 10_000_000


def write(files, root):
    """``root`` is a directory, or a URL of fsspec's."""
    for name, content in files.items():
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)
    return str(root)


@pytest.mark.parametrize("where", ["local", "fsspec"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_pictures(kind, where, tmp_path):
    root = tmp_path / "data" if where == "local" else f"memory://{uuid.uuid4().hex}"
    data = DataConfig(write(FORMATS[kind](), root), mask_key="mask", caption_lines=True)
    units = list_splits(data)
    raws = [raw for unit in units for raw in read_split(data, unit)]
    assert [raw.reason for raw in raws] == ["", "", ""]
    assert [raw.content for raw in raws] == list(PICTURES.values())
    assert [raw.captions for raw in raws] == list(CLEAN.values())
    assert [raw.mask for raw in raws] == [MASK, None, None]
    locators = [raw.locator for raw in raws]
    order = [2, 0, 1, 0]
    found = open_pictures(data, [locators[at] for at in order])
    assert list(found) == [list(PICTURES.values())[at] for at in order]
    assert list(open_pictures(data, [raws[0].mask_locator])) == [MASK]
    assert list_splits(data) == units


def test_a_single_file_is_a_source(tmp_path):
    write(as_tar(), tmp_path)
    (unit,) = list_splits(DataConfig(str(tmp_path / "train-0.tar")))
    data = DataConfig(str(tmp_path / "train-0.tar"))
    raws = list(read_split(data, unit))
    assert [raw.content for raw in raws] == list(PICTURES.values())
    assert list(open_pictures(data, [raws[1].locator])) == [raws[1].content]


def test_metadata_csv(tmp_path):
    write({"1.png": PICTURES["a"], "metadata.csv": b"file_name,text\n1.png,\"red, round\"\n"},
          tmp_path)  # fmt: skip
    data = DataConfig(str(tmp_path))
    assert next(read_split(data, list_splits(data)[0])).captions == ("red, round",)


def test_a_unit_is_another_when_and_only_when_its_files_are(tmp_path):
    data = DataConfig(write(as_text_files(), tmp_path))
    (before,) = [unit.digest for unit in list_splits(data)]
    (tmp_path / "notes.md").write_text("other")
    assert [unit.digest for unit in list_splits(data)] == [before]
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    (after,) = [unit.digest for unit in list_splits(data)]
    assert after != before


def test_a_new_picture_changes_few_units(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyflux.cache.sources.folder.PICTURES_PER_UNIT", 16)
    files = {f"{i:04d}.png": b"" for i in range(300)}
    data = DataConfig(write(files, tmp_path))
    before = list_splits(data)
    lengths = [len(list(read_split(data, unit))) for unit in before]
    assert sum(lengths) == 300
    assert max(lengths) <= 16
    assert min(lengths[:-1]) >= 4
    write({"0100b.png": b""}, tmp_path)
    new = {unit.digest for unit in list_splits(data)} - {unit.digest for unit in before}
    # Its own; and if that moved a cut, those up to the next name that is one.
    assert 1 <= len(new) <= 5


def reasons(data):
    return [raw.reason for unit in list_splits(data) for raw in read_split(data, unit)]


def test_what_is_wrong_with_single_pictures_is_told(tmp_path):
    files = as_text_files()
    del files["a.mask.png"]
    del files["a.txt"]
    files["b.txt"] = b" \n"
    files["c.txt"] = b"\xff\xfe\xff"
    found = reasons(DataConfig(write(files, tmp_path / "folder")))
    assert "'a.png' has no caption" in found[0]
    assert "'b.txt' is empty" in found[1]
    assert "'c.txt' is not UTF-8" in found[2]


def one_picture(tmp_path, caption, **options):
    line = f'{{"file_name": "a.png", "text": {caption}}}'.encode()
    data = DataConfig(write({"a.png": PICTURES["a"], "metadata.jsonl": line}, tmp_path), **options)
    (raw,) = read_split(data, list_splits(data)[0])
    return raw


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("7", "is of type int, not text"),
        ("null", "is empty"),
        ('["", " "]', "is empty"),
        (r'"half a pair: \ud800"', "not Unicode"),
    ],
)
def test_captions_that_are_none_have_a_reason(caption, message, tmp_path):
    raw = one_picture(tmp_path, caption)
    assert raw.captions == ()
    assert message in raw.reason


def test_captions_may_hold_whatever_else_unicode_calls_a_line_break(tmp_path):
    assert one_picture(tmp_path, '"red\u2028and\x85round"').captions == ("red and round",)


def test_files_beyond_any_picture_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyflux.cache.sources.raw.MAX_FILE_BYTES", 20)
    for kind, make in FORMATS.items():
        data = DataConfig(write(make(), tmp_path / kind), mask_key="mask")
        assert all("more than the 20" in reason for reason in reasons(data))


def damaged_tars():
    whole = as_tar()["train-0.tar"]
    return {
        "cut in a picture": whole[:900],
        "cut in a header": whole[: 4 * 512 + 100],
        "a damaged header": whole[:2048] + bytes(range(256)) * 2 + whole[2560:],
        "compressed": zlib.compress(whole),
        "empty": b"",
    }


@pytest.mark.parametrize("name", damaged_tars())
def test_a_damaged_tar_is_not_a_shorter_one(name, tmp_path):
    data = DataConfig(write({"a.tar": damaged_tars()[name]}, tmp_path))
    with pytest.raises(InputError, match=r"'a\.tar' is not a whole, uncompressed tar"):
        reasons(data)


def test_a_tar_without_an_end_mark_is_whole(tmp_path):
    whole = as_tar()["train-0.tar"].rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    assert reasons(DataConfig(write({"a.tar": whole}, tmp_path))) == ["", "", ""]


def test_members_that_macos_adds_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("._a.png", "a.png", "._a.txt", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"red"))
    assert reasons(DataConfig(str(tmp_path))) == [""]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_failing_storage_costs_no_picture(kind, tmp_path, monkeypatch):
    data = DataConfig(write(FORMATS[kind](), tmp_path))
    units = list_splits(data)
    locators = [raw.locator for unit in units for raw in read_split(data, unit)]

    class Failing(MemoryFileSystem):
        def isfile(self, path):
            return True

        def _open(self, path, *args, **kwargs):
            raise OSError("the network is down")

    failing = filesystem.Place(fs.PyFileSystem(fs.FSSpecHandler(Failing())), "/data")
    for module in ("folder", "webdataset", "parquet", "splits"):
        monkeypatch.setattr(f"tinyflux.cache.sources.{module}.open_place", lambda *_: failing)
    with pytest.raises(InputError, match=r"cannot be read now \(the network is down"):
        list(read_split(data, units[0]))
    with pytest.raises(InputError, match=r"cannot be read now \(the network is down"):
        list(open_pictures(data, locators))


def test_a_row_without_bytes_and_a_column_of_something_else(tmp_path):
    rows = [{"image": {"bytes": None, "path": "x.png"}, "text": "red", "label": 1},
            {"image": {"bytes": b"x", "path": None}, "text": "red", "label": 1}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert ["no bytes" in reason for reason in reasons(DataConfig(str(tmp_path)))] == [True, False]
    with pytest.raises(InputError, match=r"'label' .* is of type int64, not the bytes of pictures"):
        list_splits(DataConfig(str(tmp_path), image_key="label"))


def test_masks_that_metadata_names(tmp_path):
    line = {"file_name": "a.png", "text": "red", "mask": "masks/a.png"}
    files = {"a.png": PICTURES["a"], "masks/a.png": MASK}
    folder = write({**files, "metadata.jsonl": json.dumps(line).encode()}, tmp_path)
    data = DataConfig(folder, mask_key="mask")
    ((raw,),) = [read_split(data, unit) for unit in list_splits(data)]
    assert raw.mask == MASK
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(InputError, match=r"line 1 lists 'masks/a\.png', which does not exist"):
        list_splits(data)


@pytest.mark.parametrize("where", ["local", "fsspec"])
def test_some_files_of_a_folder(where, tmp_path):
    root = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    tar = as_tar()["train-0.tar"]
    write({"x/train-0.tar": tar, "x/train-1.tar": tar, "x/test-0.tar": b"", "a.tar": b""}, root)
    data = DataConfig(f"{root}/x/train-*.tar")
    raws = [raw for unit in list_splits(data) for raw in read_split(data, unit)]
    assert [raw.source for raw in raws] == [
        f"train-{tar}.tar/x/{name}" for tar in (0, 1) for name in PICTURES
    ]
    found = list(open_pictures(data, [raw.locator for raw in raws[::-1]]))
    assert found == [raw.content for raw in raws[::-1]]
    with pytest.raises(InputError, match="holds no pictures"):
        list_splits(DataConfig(f"{root}/x/val-*.tar"))


def test_brackets_may_be_part_of_a_name(tmp_path):
    data = DataConfig(write(as_text_files(), tmp_path / "a[1]"), caption_lines=True)
    assert len(list(read_split(data, list_splits(data)[0]))) == 4


def test_a_name_that_is_not_text_is_named(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(PICTURES["a"])
    with pytest.raises(InputError, match="whose name is not UTF-8 text"):
        list_splits(DataConfig(str(tmp_path)))


SECRET = b"root:x:0:0"
LEAVES = "is a link that leads out of data.folder: "


@pytest.fixture
def linked(tmp_path):
    """Pictures, and beside them links that leave the folder and links that do not."""
    write({"secret.txt": SECRET, "secret.png": PICTURES["c"], "pool/d.png": PICTURES["b"],
           "pool/d.txt": b"green"}, tmp_path / "outside")  # fmt: skip
    root, outside = tmp_path / "data", tmp_path / "outside"
    write({"a.png": PICTURES["a"], "a.txt": b"red", "sub/b.png": PICTURES["b"],
           "sub/b.txt": b"blue"}, root)  # fmt: skip
    (root / "alias.png").symlink_to("a.png")
    (root / "alias.txt").symlink_to(root / "a.txt")
    (root / "loop").symlink_to(".")
    (root / "sub" / "up").symlink_to("..")
    (root / "sub" / "self").symlink_to("self")
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "c.png").symlink_to(outside / "secret.png")
    (root / "c.txt").write_text("a picture from elsewhere")
    write({"e.png": PICTURES["c"]}, root)
    (root / "e.txt").symlink_to("../outside/secret.txt")
    (root / "pool").symlink_to(outside / "pool")
    return DataConfig(str(root))


def test_links_that_leave_the_folder_are_refused(linked):
    (unit,) = list_splits(linked)
    raws = {raw.source: raw for raw in read_split(linked, unit)}
    assert list(raws) == ["a.png", "alias.png", "c.png", "e.png", "pool", "sub/b.png"]
    refused = {"c.png": "c.png", "e.png": "e.txt", "pool": "pool"}
    for source, link in refused.items():
        assert raws[source].reason.startswith(f"'{link}' {LEAVES}")
        assert "data.follow_links: true" in raws[source].reason
        assert (raws[source].content, raws[source].captions) == (b"", ())
    assert [raws[name].captions for name in ("a.png", "alias.png", "sub/b.png")] == [
        ("red",), ("red",), ("blue",)
    ]  # fmt: skip


def test_links_are_followed_where_that_is_wanted(linked):
    data = replace(linked, follow_links=True)
    (before,), (unit,) = list_splits(linked), list_splits(data)
    assert before.digest != unit.digest
    raws = {raw.source: raw for raw in read_split(data, unit)}
    assert list(raws) == ["a.png", "alias.png", "c.png", "e.png", "pool/d.png", "sub/b.png"]
    assert raws["e.png"].captions == (SECRET.decode(),)
    assert raws["pool/d.png"].captions == ("green",)
    assert not any(raw.reason for raw in raws.values())
    assert list(open_pictures(data, [raws["c.png"].locator])) == [PICTURES["c"]]


def test_a_link_to_above_the_folder_ends(tmp_path):
    root = tmp_path / "above" / "data"
    write(as_text_files(), root)
    (root / "up").symlink_to("../..")
    data = DataConfig(str(root), caption_lines=True, mask_key="mask", follow_links=True)
    (tmp_path / "above" / "z.png").write_bytes(PICTURES["a"])
    sources = [raw.source for unit in list_splits(data) for raw in read_split(data, unit)]
    assert sources == ["a.png", "b.png", "c.png", "up/above/z.png"]


def test_a_file_that_became_a_link_since_it_was_listed_is_not_read(linked, tmp_path):
    (unit,) = list_splits(linked)
    path = tmp_path / "data" / "a.txt"
    path.unlink()
    path.symlink_to(tmp_path / "outside" / "secret.txt")
    with pytest.raises(InputError, match=rf"'a\.txt' {LEAVES}"):
        list(read_split(linked, unit))
    (found,) = open_pictures(linked, ['["c.png"]'])
    assert isinstance(found, InputError)


@pytest.mark.parametrize("name", ["train-0.tar", "data/train.parquet"])
def test_links_to_whole_files_of_data_are_refused(name, tmp_path):
    write({**as_tar(), **as_parquet()}, tmp_path / "outside")
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / name.split("/")[-1]
    link.symlink_to(tmp_path / "outside" / name)
    for location in (link.parent, link.parent / "*"):
        with pytest.raises(InputError, match=rf"'{link.name}' {LEAVES}"):
            list_splits(DataConfig(str(location)))
    assert reasons(DataConfig(str(link.parent), follow_links=True)) == ["", "", ""]
    # Who names the link itself means what it leads to.
    assert reasons(DataConfig(str(link))) == ["", "", ""]


def test_links_to_metadata_are_refused_and_the_folder_itself_may_be_a_link(tmp_path):
    write(as_metadata_jsonl(), tmp_path / "real")
    (tmp_path / "named").symlink_to("real/in")
    named = DataConfig(str(tmp_path / "named"), mask_key="mask")
    assert reasons(named) == ["", "", ""]
    (tmp_path / "real" / "in" / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    (tmp_path / "real" / "in" / "metadata.jsonl").symlink_to("../../metadata.jsonl")
    with pytest.raises(InputError, match=rf"'metadata\.jsonl' {LEAVES}"):
        list_splits(named)
    assert reasons(replace(named, follow_links=True)) == ["", "", ""]


def test_a_folder_opened_by_fsspec_has_the_same_rules(linked):
    by_url = DataConfig(f"local://{linked.folder}")
    assert list_splits(by_url) == list_splits(linked)


def test_a_link_inside_a_pattern_is_said(tmp_path):
    write({"x/a.tar": as_tar()["train-0.tar"]}, tmp_path / "outside")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").symlink_to(tmp_path / "outside" / "x")
    with pytest.raises(InputError, match=f"'x' {LEAVES}"):
        list_splits(DataConfig(f"{tmp_path}/data/*/a.tar", format="webdataset"))


def test_a_local_file_has_the_size_and_time_that_pyarrow_says(tmp_path):
    # A unit's digest holds them, so caches that were indexed before are not indexed again.
    write(as_text_files(), tmp_path)
    (unit,) = list_splits(DataConfig(str(tmp_path), mask_key="mask"))
    info = fs.LocalFileSystem().get_file_info(str(tmp_path / "a.png"))
    assert json.loads(unit.part)[0]["picture"] == ["a.png", info.size, info.mtime_ns]


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a.png", PICTURES["a"]), ("b.png", PICTURES["b"])):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind, target in (
            ("a.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("b.txt", tarfile.LNKTYPE, "a.png"),
            ("c.png", tarfile.SYMTYPE, "a.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    found = reasons(DataConfig(str(tmp_path)))
    assert [reason.split(" has ")[1] for reason in found] == ["no .txt and no .json caption"] * 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"red"}, "holds no pictures"),
        ({"a.parquet": b"PAR1"}, "not a whole Parquet file"),
        ({**as_tar(), **as_parquet()}, "webdataset and parquet data"),
        ({"metadata.jsonl": b"{"}, "line 1 is not JSON"),
        ({"metadata.jsonl": b'{"file_name": "9.png", "text": "x"}'}, "lists '9.png'"),
        ({"metadata.jsonl": b'{"file_name": "9.png"}'}, "has no file_name and text"),
    ],
)
def test_sources_that_cannot_be_read_are_explained(files, message, tmp_path):
    with pytest.raises(InputError, match=message):
        list_splits(DataConfig(write(files, tmp_path)))


def test_columns_and_places_that_are_not_there(tmp_path):
    folder = write(as_parquet(), tmp_path)
    with pytest.raises(InputError, match=r"no column 'prompt' \(it has image, text, mask\)"):
        list_splits(DataConfig(folder, caption_key="prompt"))
    with pytest.raises(InputError, match="does not exist"):
        list_splits(DataConfig(str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="cannot be opened"):
        list_splits(DataConfig("nosuch://bucket/data"))
    with pytest.raises(ConfigError, match=r"'bukket' is unknown \(did you mean 'bucket'"):
        DataConfig(resize="bukket")


def test_a_picture_that_went_away_is_an_error_of_its_own(tmp_path):
    data = DataConfig(write(as_text_files(), tmp_path))
    (tmp_path / "b.png").unlink()
    gone, there = open_pictures(data, ['["b.png"]', '["a.png"]'])
    assert isinstance(gone, InputError)
    assert there == PICTURES["a"]


def decode(content, name="x"):
    return decode_picture(content, name, LIMIT)


def without_adobe_marker(mode, colour):
    """A JPEG of negatives, as PIL writes CMYK, without the marker that says so."""
    content = encoded(Image.new(mode, (8, 8), colour), "JPEG")
    start = content.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", content, start + 2)
    return content[:start] + content[start + 2 + length :]


def test_pictures_of_every_mode_come_out_right():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    grey16 = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([1, 2, 3])
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(grey16)).getpixel((0, 0)) == (128, 128, 128)
    assert decode(encoded(grey16, "TIFF")).getpixel((0, 0)) == (128, 128, 128)
    assert decode(encoded(palette)).getpixel((0, 0)) == (1, 2, 3)
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("CMYK", (8, 8)), "JPEG")).getpixel((4, 4)) == (255, 255, 255)
    cyan = decode(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")).getpixel((4, 4))
    assert cyan[0] < 60
    assert min(cyan[1:]) > 200
    assert decode(without_adobe_marker("CMYK", (0, 255, 255, 255))).getpixel((4, 4)) == cyan
    assert decode(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = decode(moving).getpixel((1, 1))
        assert red > 200
        assert blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    upright = Image.new("RGB", (16, 8), "white")
    upright.paste("red", (0, 0, 4, 4))  # upper left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each, of PIL's transposes
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "PNG", exif=exif))
    assert found.size == (16, 8)
    assert found.getpixel((1, 1)) == (255, 0, 0)
    assert found.getpixel((14, 6)) == (255, 255, 255)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(width, height, tile):
    """One tile, larger than the picture."""
    body = zlib.compress(bytes(tile * tile), 9)
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile,
            324: 8, 325: len(body)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


HOSTILE = {
    "zero bytes": (b"", "not a picture"),
    "HTML": (b"<!doctype html><html></html>", "not a picture"),
    "truncated": (encoded(Image.effect_noise((64, 64), 50))[:900], "is broken"),
    "a header of 60,000 x 60,000": (png(60_000, 60_000), "is too large"),
    "just over the limit": (png(4000, 2501), "are more than data.max_pixels = 10000000"),
    "a bomb in a text chunk": (
        png(4, 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000), 9))),
        "is broken",
    ),
    "a tile of 4,000 x 4,000": (tiff(4, 4, 4000), "is too large: 4000 x 4000"),
    "a float": (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
    "32 bits": (encoded(Image.new("I", (2, 2), 70_000), "TIFF"), "more than 16 bits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_one_sentence(name):
    content, message = HOSTILE[name]
    with pytest.raises(InputError, match=message) as caught:
        decode(content, "evil.png")
    assert "evil.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_data_than_a_small_header_announces_is_not_kept():
    bomb = png(4, 4, chunk(b"IDAT", zlib.compress(bytes(80_000_000), 9)))
    assert decode(bomb).size == (4, 4)


def test_masks_have_the_picture_s_size_and_are_cut_like_it():
    mask = Image.new("L", (48, 16))
    mask.paste(255, (16, 0, 32, 16))
    found = decode_mask(encoded(mask), "a.png", (48, 16), LIMIT)
    assert fit_mask(found, (16, 16)).getcolors() == [(256, 255)]
    picture = mask.convert("RGB")
    assert fit_picture(picture, (16, 16)).getcolors() == [(256, (255, 255, 255))]
    with pytest.raises(InputError, match="48 x 16 pixels, the picture 16 x 16"):
        decode_mask(encoded(mask), "a.png", (16, 16), LIMIT)


def test_masks_of_other_kinds():
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    ones = Image.new("L", (2, 1))
    ones.putpixel((0, 0), 1)
    for mask in (clear, ones, ones.point(lambda value: value * 255).convert("1")):
        found = decode_mask(encoded(mask), "a.png", (2, 1), LIMIT)
        assert [found.getpixel((x, 0)) for x in (0, 1)] == [255, 0]


@given(
    side=st.integers(8, 700),
    step=st.sampled_from([4, 8]),
    aspect=st.floats(1, 4),
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
)
def test_sides_that_are_no_multiple_of_the_step_have_buckets_too(side, step, aspect, width, height):
    data = DataConfig(resize="bucket", areas=(side,), step=step, max_aspect=aspect)
    w, h = choose_size(width, height, data)
    assert w % step == h % step == 0
    assert w * h <= side * side
    assert max(w, h) <= aspect * min(w, h)
    assert choose_size(height, width, data) in ((w, h), (h, w))


@given(
    area=st.integers(2, 40),
    step=st.sampled_from([4, 8, 64]),
    aspect=st.floats(1, 4),
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
)
def test_buckets(area, step, aspect, width, height):
    side = area * step
    sizes = size_buckets(side, step, aspect)
    assert (side, side) in sizes
    for w, h in sizes:
        assert w % step == h % step == 0
        assert w * h <= side * side
        assert max(w, h) <= aspect * min(w, h)
        assert (h, w) in sizes
    data = DataConfig(resize="bucket", areas=(side, 2 * side), step=step, max_aspect=aspect)
    chosen = choose_size(width, height, data)
    options = size_buckets(2 * side if width * height >= 4 * side * side else side, step, aspect)
    wanted = math.log(width / height)
    nearest = min(abs(math.log(w / h) - wanted) for w, h in options)
    assert chosen in options
    assert abs(math.log(chosen[0] / chosen[1]) - wanted) == nearest


def test_units_are_plain_data():
    assert SourceSplit("folder", "[]").digest == SourceSplit("folder", "[]").digest
    assert SourceSplit("folder", "[]").digest != SourceSplit("parquet", "[]").digest
