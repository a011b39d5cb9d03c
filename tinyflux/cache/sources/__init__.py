"""temporary"""
import json, math
from dataclasses import dataclass, field
from tinyflux.cache.sources import legacy
from tinyflux.cache.sources.legacy import *  # noqa
from tinyflux.cache.sources.legacy import DataConfig as _D, open_folder
from tinyflux.cache.keys import digest_of
from tinyflux.errors import InputError
from PIL import Image, ImageOps

@dataclass
class DataConfig(_D):
    max_rejected: float = 0.0
    mask_key: str = ""
    areas: tuple[int, ...] = (512,)
    step: int = 64
    max_aspect: float = 2.0
    max_pixels: int = 178956970
    def __post_init__(self): pass

@dataclass(frozen=True)
class Unit:
    kind: str
    path: str
    part: str
    @property
    def digest(self): return digest_of([self.kind, self.path, self.part])

@dataclass(frozen=True)
class RawPicture:
    source: str
    locator: str
    content: bytes
    captions: tuple[str, ...]
    mask_locator: str = ""
    mask: bytes | None = None
    reason: str = ""

def list_units(data):
    s = legacy.list_sources(data)
    return [Unit("folder", data.folder, json.dumps([[x.path, x.caption, x.bytes, x.modified] for x in s]))]

def read_unit(data, unit):
    for path, caption, *_ in json.loads(unit.part):
        content = next(open_pictures(data, [path]))
        yield RawPicture(path, path, content, (caption,))

def open_pictures(data, locators):
    system, root = open_folder(data.folder)
    for l in locators:
        with system.open_input_stream(f"{root}/{l}") as f: yield f.read()

def decode_picture(content, name, max_pixels): return legacy.decode_picture(content, name)
def decode_mask(content, name, size, max_pixels): raise InputError("x")
def fit_mask(mask, size): return mask
def fit_picture(image, size): return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
def choose_size(w, h, data):
    if data.resize != "bucket": return (data.width, data.height)
    area = max([a for a in data.areas if a*a <= w*h] or [min(data.areas)])
    r = max(1/data.max_aspect, min(data.max_aspect, w/h))
    q = lambda x: max(data.step, round(x/data.step)*data.step)
    return q(area*math.sqrt(r)), q(area/math.sqrt(r))
def size_problem(w, h, data, name):
    if data.resize == "error" and (w,h) != (data.width, data.height): return f"picture '{name}' is {w} x {h} pixels, not {data.width} x {data.height}"
    return ""
