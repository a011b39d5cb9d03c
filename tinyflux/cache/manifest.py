"""The manifest: what a dataset is made of. Written last; what it does not list is not there."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tinyflux.cache.keys import digest_of, variant_of
from tinyflux.cache.schema import FORMAT_VERSION, Layout
from tinyflux.errors import CacheError, ConfigError
from tinyflux.storage.folder import Folder
from tinyflux.util.config import from_dict, to_dict

MANIFEST_NAME = "manifest.json"
BUILD_MARK = "build.json"  # in a directory that a build job owns, from its first moment on


# There are millions of these in a large dataset.
@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the dataset: path relative to it, size, checksum, where its tensors lie."""

    path: str
    bytes: int
    sha256: str
    columns: dict[str, Layout] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Row-aligned files, one per column group.

    Attributes:
        rows: in each file, dropped ones included.
        dropped: places of rows that are in the files but not in the dataset: a model could make
            nothing of them, and their numbers are zeros, or their captions are too long and
            ``data.long_captions`` is ``"reject"``. They stand in the ``rejected`` table.
    """

    name: str
    rows: int
    files: dict[str, FileInfo]
    dropped: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """Rows that belong to the dataset."""
        return self.rows - len(self.dropped)


@dataclass(frozen=True)
class CutCaptions:
    """How many samples have captions of more tokens than CLIP and T5 read."""

    clip: int = 0
    t5: int = 0

    def __str__(self) -> str:
        return (
            f"captions cut to what the text encoders read: {self.clip} for CLIP, {self.t5} for T5"
        )


@dataclass(frozen=True)
class ModelInfo:
    """A frozen model that made a column: where it came from and the digest of its weights."""

    repo: str
    digest: str


@dataclass(frozen=True)
class GroupInfo:
    """What made a column group: the models, their dtype, the extractor's version and settings."""

    models: dict[str, ModelInfo]
    dtype: str
    code_version: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest of what decides the numbers: not of the names that weights go by."""
        data = to_dict(self)
        return digest_of({**data, "models": {k: v["digest"] for k, v in data["models"].items()}})


# What a recipe and a model must have the same.
MODEL_SETTINGS = ("t5_layers", "max_text_length", "text_padding", "latent_shift")


@dataclass(frozen=True)
class Recipe:
    """What the numbers mean. ``None`` is unknown: tensors that a caller brought.

    Attributes:
        seed: of the teachers' noise.
        t_buckets: student times at which the teachers ran.
        t5_layers, max_text_length, text_padding, latent_shift: as in ``TinyFluxConfig``.
        latent_scale: factor of the latents after the shift.
        groups: what made each column group.
    """

    seed: int | None = None
    t_buckets: tuple[float, ...] | None = None
    t5_layers: tuple[int, ...] | None = None
    max_text_length: int | None = None
    text_padding: str | None = None
    latent_shift: float | None = None
    latent_scale: float | None = None
    groups: dict[str, GroupInfo] = field(default_factory=dict)

    def merged(self, other: "Recipe") -> "Recipe":
        """This recipe with what only ``other`` knows."""
        known = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if getattr(self, item.name) is not None
        }
        return dataclasses.replace(other, **{**known, "groups": {**other.groups, **self.groups}})


@dataclass(frozen=True)
class Manifest:
    """A whole dataset.

    Attributes:
        rows: number of samples over all shards.
        built: a build job made it, and may change it; else it was saved from memory.
        index: files that say what pictures there were, by path.
        rejected: file of pictures that are not in it and why, if any.
        null_text: file of the empty caption's embedding (``t5_embeds`` [L, D], ``clip_pooled``
            [P]), if known.
        cut_captions: None where every caption was read whole.
    """

    rows: int
    recipe: Recipe
    shards: tuple[ShardInfo, ...]
    null_text: FileInfo | None = None
    rejected: FileInfo | None = None
    index: tuple[str, ...] = ()
    name: str = "dataset"
    built: bool = False
    format_version: int = FORMAT_VERSION
    cut_captions: CutCaptions | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the column groups that every shard has."""
        return tuple(self.shards[0].files)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that each picture has, the plain one's (empty) first."""
        return tuple(dict.fromkeys(["", *map(variant_of, self.groups)]))

    @property
    def files(self) -> list[FileInfo]:
        """Every file that the manifest lists."""
        found = [file for shard in self.shards for file in shard.files.values()]
        return found + [file for file in (self.null_text, self.rejected) if file]

    def layout(self, column: str) -> Layout | None:
        """The first shard's layout of ``column``, ``None`` where the dataset has no such column."""
        for file in self.shards[0].files.values():
            if column in file.columns:
                return file.columns[column]
        return None

    def to_json(self) -> bytes:
        """Readable JSON, one line per shard."""
        head = to_dict(dataclasses.replace(self, shards=()))
        lines = ",\n  ".join(json.dumps(to_dict(shard)) for shard in self.shards)
        del head["shards"]
        if self.cut_captions is None:
            del head["cut_captions"]  # earlier versions know no such name
        text = json.dumps(head, indent=1)
        return (text[: -len("\n}")] + f',\n "shards": [\n  {lines}\n ]\n}}\n').encode()

    def save(self, folder: Folder) -> None:
        """Commit the dataset: from here on it exists."""
        folder.write(MANIFEST_NAME, self.to_json())

    @classmethod
    def load(cls, folder: Folder, name: str = MANIFEST_NAME) -> "Manifest":
        """Read ``manifest.json``, or what is written like it by another ``name``.

        Raises:
            CacheError: there is none, it is damaged, or a newer program wrote it.
        """
        path = f"{folder.location}/{name}"
        try:
            data = json.loads(folder.read(name), object_hook=_Files())
        except (FileNotFoundError, NotADirectoryError):
            unfinished = folder.size(BUILD_MARK) is not None
            raise CacheError(
                f"the cache '{folder.location}' is not finished: run the build again to complete it"
                if unfinished
                else f"there is no cache at '{folder.location}': build it first, or check the path"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(f"'{path}' is damaged ({error}): build the cache again") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CacheError(
                f"'{path}' has format version {version}, this program reads up to "
                f"{FORMAT_VERSION}: upgrade tinyflux"
            )
        if isinstance(version, int) and version < FORMAT_VERSION:
            raise CacheError(
                f"'{path}' has format version {version}, from before the first release: delete "
                f"the cache and build it again"
            )
        try:
            files = {name: data.pop(name) for name in ("null_text", "rejected")}
            shards = tuple(
                ShardInfo(**{**shard, "dropped": tuple(shard["dropped"])})
                for shard in data.pop("shards")
            )
            head = from_dict(cls, {**data, "shards": []}, path)
            manifest = dataclasses.replace(head, shards=shards, **files)
        except (ConfigError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise CacheError(f"'{path}' is damaged ({error}): build the cache again") from error
        if not manifest.shards or manifest.rows != sum(s.samples for s in manifest.shards):
            raise CacheError(f"'{path}' is damaged (row counts): build the cache again")
        return manifest


class _Files:
    """Makes files of JSON objects while they are parsed.

    A large dataset has a million of them. Its files lie alike, so they share their layouts.
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[tuple[str, Layout], ...], dict[str, Layout]] = {}

    def __call__(self, item: dict[str, Any]) -> Any:
        if "offset" in item:
            return Layout(**{**item, "shape": tuple(item["shape"])})
        if "sha256" in item:
            columns = item["columns"]
            shared = self._columns.setdefault(tuple(columns.items()), columns)
            return FileInfo(item["path"], item["bytes"], item["sha256"], shared)
        return item


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()
