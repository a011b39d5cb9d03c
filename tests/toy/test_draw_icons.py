import base64
import contextlib
import functools
import hashlib
import io
import json
import tarfile
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tinyflux.cli.main import run_job
from tinyflux.errors import InputError, StorageError
from tinyflux.toy import draw_icons
from tinyflux.toy.draw_icons import Package, Thing, draw, match_things, open_package
from tinyflux.toy.icons import STYLES

pytest.importorskip("resvg_py", reason="drawings are made with the demo extra")

OPENMOJI = STYLES[0]
SQUARE = '<path fill="#00f" d="M18 18h36v36H18z"/>'


@pytest.fixture
def packed(tmp_path):
    """A folder with a package as npm packs it, and the style whose package it is."""
    members = {
        "icons.json": {
            "icons": {"blue-square": {"body": SQUARE}},
            "aliases": {"square": {"parent": "blue-square"}},
        },
        "chars.json": {"1f7e6-fe0f": "square"},
    }
    path = tmp_path / f"iconify-json-{OPENMOJI.package}-{OPENMOJI.version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            text = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return tmp_path, replace(OPENMOJI, integrity=f"sha512-{digest}")


def test_a_package_is_opened_from_a_folder(packed):
    folder, style = packed
    package = open_package(style, folder)
    assert package.names == {("1f7e6",): "square"}
    assert package.drawing("square") == "blue-square"


@contextlib.contextmanager
def registry(folder):
    """Serves a folder; its address."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_package_is_fetched_from_the_registry(packed, tmp_path, monkeypatch):
    folder, style = packed
    place = tmp_path / "@iconify-json" / style.package / "-"
    place.mkdir(parents=True)
    [tarball] = folder.glob("*.tgz")
    tarball.rename(place / f"{style.package}-{style.version}.tgz")
    with registry(tmp_path) as address:
        monkeypatch.setattr(draw_icons, "REGISTRY", address)
        assert open_package(style, None).icons == {"blue-square": {"body": SQUARE}}
        with pytest.raises(StorageError, match=r"404.*--packages"):
            open_package(replace(style, version="0.0.0"), None)


def test_another_tarball_than_the_pinned_one_is_refused(packed):
    folder, _ = packed
    with pytest.raises(InputError, match="is not the tarball that is expected"):
        open_package(OPENMOJI, folder)


@pytest.mark.parametrize("options", [["--packages", "."], ["--size", "0"]])
def test_the_command_refuses_in_one_sentence(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_job("toy", ["icons", "out", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_drawing_is_on_white_without_the_styles_margin():
    with Image.open(io.BytesIO(draw(SQUARE, OPENMOJI, 60))) as picture:
        assert (picture.mode, picture.size) == ("RGB", (60, 60))
        assert picture.getpixel((2, 2)) == (255, 255, 255)
        box = Image.eval(picture.convert("L"), lambda value: 255 - value).getbbox()
    assert box == (12, 12, 48, 48)


def package(names, icons=(), aliases=None):
    found = {name: {"body": ""} for name in (*names.values(), *icons)}
    return Package(found, aliases or {}, {tuple(k.split()): v for k, v in names.items()})


def test_things_are_matched_by_code_point_and_else_by_name():
    names = {"1f43b": "bear", "1f44d": "thumbs-up", "1f44d 1f3fb": "thumbs-up-light",
             "1f1e6 1f1e8": "flag-ac"}  # fmt: skip
    packages = {
        "OpenMoji": package(names, aliases={"bear-face": {"parent": "bear"}}),
        "Noto": package({**names, "1f43b": "brown-bear"}),
        "Twemoji": package(names),
        "Fluent": package({"1f44d": "thumbs-up"}),
        "EmojiOne": package({}, ["bear-face", "flag-ac", "thumbs-up-light"]),
    }
    in_four = {"OpenMoji": "bear", "Noto": "brown-bear", "Twemoji": "bear", "EmojiOne": "bear-face"}
    everywhere = dict.fromkeys(("OpenMoji", "Noto", "Twemoji", "Fluent"), "thumbs-up")
    assert match_things(packages) == [
        Thing("bear", "\N{BEAR FACE}", in_four),
        Thing("thumbs up", "\N{THUMBS UP SIGN}", everywhere),
    ]


def test_what_three_styles_draw_is_left_out():
    three = {style.name: package({"1f43b": "bear"}) for style in STYLES[:3]}
    assert match_things(three) == []
    assert len(match_things({**three, "Fluent": package({"1f43b": "bear"})})) == 1
