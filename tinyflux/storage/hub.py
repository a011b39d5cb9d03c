"""Repositories of the Hugging Face Hub as folders, by the Hub's own fsspec file system.

The token is the Hub's own (``HF_TOKEN`` or ``hf auth login``): it is read there and kept nowhere.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
from pyarrow import fs

from tinyflux.errors import InputError
from tinyflux.util.text import first_line

SCHEME = "hf://"
# A commit stands where a branch or a tag may, and names the same files for good.
_COMMIT = re.compile(r"hf://(?:[^/@]+/){1,2}[^/@]+@[0-9a-f]{40}(?:/|$)")


def is_hub(location: str) -> bool:
    """Whether this is a place on the Hub."""
    return location.startswith(SCHEME)


def open_hub(location: str) -> tuple[fs.PyFileSystem, str]:
    """The file system of an ``hf://`` URL, and the path in it."""
    system, path = fsspec.core.url_to_fs(location)
    return fs.PyFileSystem(_HubHandler(system)), path


def pinned(location: str) -> str:
    """An ``hf://`` URL at the commit that its branch or tag stands for now, the default one's too.

    Every process that is told this URL reads the same files, however long it takes and whatever is
    committed meanwhile. Any other location is given back as it is.

    Raises:
        InputError: there is no such repository or revision, or the Hub cannot be asked.
    """
    if not is_hub(location) or _COMMIT.match(location):
        return location
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.constants import REPO_TYPES_URL_PREFIXES

    try:
        with _reached():
            # A system of its own: one that is shared remembers what there was.
            place: Any = HfFileSystem(skip_instance_cache=True).resolve_path(location)
            if not hasattr(place, "repo_id"):  # a bucket, which has no commits
                return location
            kind, name = place.repo_type, place.repo_id
            commit = HfApi().repo_info(name, repo_type=kind, revision=place.revision).sha
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{location}' cannot be opened ({first_line(error):.200}): check its name and that "
            f"the Hub can be reached; what is private or gated needs HF_TOKEN or `hf auth login`"
        ) from error
    root = f"{SCHEME}{REPO_TYPES_URL_PREFIXES.get(kind, '')}{name}@{commit}"
    return f"{root}/{place.path_in_repo}" if place.path_in_repo else root


def content_digests(system: fs.FileSystem, root: str) -> dict[str, str]:
    """Git's digest of each file's content below ``root``, by path; none where it is not the Hub's.

    The Hub knows no times of files, and a size alone does not tell that one was changed.
    """
    handler = system.handler if isinstance(system, fs.PyFileSystem) else None
    if not isinstance(handler, _HubHandler):
        return {}
    with _reached():
        found = handler.fs.find(root, detail=True)
    return {path: info["blob_id"] for path, info in found.items() if "blob_id" in info}


class _HubHandler(fs.FSSpecHandler):
    """Reading as pyarrow wants it: whatever goes wrong on the way is an OSError."""

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        with _reached():
            infos: list[fs.FileInfo] = super().get_file_info(paths)
        return infos

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        with _reached():
            infos: list[fs.FileInfo] = super().get_file_info_selector(selector)
        return infos

    def open_input_file(self, path: str) -> pa.PythonFile:
        # Not by asking first whether it is a file, which takes any error of the Hub's for a no.
        with _reached():
            return pa.PythonFile(_Reading(self.fs.open(path, "rb")), mode="r")

    open_input_stream = open_input_file


class _Reading:
    """A file of the Hub whose every read may go wrong on the way."""

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        with _reached():
            content: bytes = self._file.read(size)
        return content


@contextmanager
def _reached() -> Iterator[None]:
    """Within it, a connection that fails is an OSError, as the Hub's answers of errors are."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP client's own base of errors, which is another package's in another version.
    bases = HfHubHTTPError.__mro__
    of_client: type[Exception] = next(base for base in bases if base.__name__ == "HTTPError")
    try:
        yield
    except OSError:
        raise
    except of_client as error:
        raise ConnectionError(
            f"{constants.ENDPOINT} does not answer: {first_line(error)}"
        ) from error
