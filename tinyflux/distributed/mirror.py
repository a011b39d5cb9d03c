"""A run that is kept at a URL and worked on in a directory of this machine."""

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tinyflux.errors import StorageError
from tinyflux.run_dir import BEST, CHECKPOINT_STATE, CHECKPOINTS, DRAWN, MARKS, PASSES, RAY
from tinyflux.storage.copies import local_directory
from tinyflux.storage.remote import RemoteFolder
from tinyflux.trainer.best import read_best
from tinyflux.util.urls import is_url

# The pictures of `tinyflux sample` may be millions of files; passes are written there at once.
_NOT_MIRRORED = (RAY, DRAWN, PASSES)

logger = logging.getLogger(__name__)


class Mirror:
    """Copies a run's directory to its URL, what is new of it.

    Args:
        keep: how many checkpoints to keep there, by the start of their names.
    """

    def __init__(self, folder: RemoteFolder, root: Path, keep: Mapping[str, int] | None = None):
        self.folder, self.root, self._keep = folder, root, dict(keep or {})
        self._known: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Begin with what is there, but for checkpoints; StorageError."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        for path in self.folder.list():
            if path.split("/", 1)[0] in (CHECKPOINTS, *_NOT_MIRRORED):
                continue
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.download(path, target)
            self._known[path] = _state(target)

    def push(self) -> None:
        """Upload what is new or has changed, and delete what is one checkpoint too many.

        Checkpoints come after the figures, which a run that continues from them relies on.

        Raises:
            StorageError: what is there already stays as it is; a later push goes on.
        """
        paths = [str(path.relative_to(self.root)) for path in self.root.rglob("*")
                 if path.is_file()]  # fmt: skip
        for path in sorted(paths, key=_turn):
            parts = path.split("/")
            if parts[0] in _NOT_MIRRORED or any(part.startswith(".") for part in parts):
                continue
            try:
                state = _state(self.root / path)
                if self._known.get(path) != state:
                    self.folder.upload(self.root / path, path)
                    self._known[path] = state
            except FileNotFoundError:
                continue  # pruned meanwhile
        best = read_best(self.root / BEST)
        spared = set() if best is None else {best.checkpoint}
        for kind, keep in self._keep.items():
            self._prune(kind, keep, spared)

    def push_if_reached(self) -> None:
        """Upload, or leave it to a later time: a run is worth more than its network's bad hour."""
        try:
            self.push()
        except StorageError as error:
            logger.warning("this checkpoint is not uploaded until the next one is: %s", error)

    def _prune(self, kind: str, keep: int, spared: Collection[str]) -> None:
        there = self.folder.list(CHECKPOINTS)
        names = {path.split("/")[1] for path in there if path.endswith(CHECKPOINT_STATE)}
        old = sorted(name for name in names if name.startswith(f"{kind}_"))
        written = sorted(path.name for path in (self.root / CHECKPOINTS).glob(f"{kind}_*"))
        if written:  # later ones are damaged: the run has still to reach them, and replaces them
            old = [name for name in old if name <= written[-1]]
        for name in (one for one in old[: max(0, len(old) - keep)] if one not in spared):
            files = [path for path in there if path.startswith(f"{CHECKPOINTS}/{name}/")]
            for path in sorted(files, key=_turn, reverse=True):
                self.folder.delete(path)


@contextmanager
def working_copy(place: str) -> Iterator[Path]:
    """The run's directory ``place``, or a copy of what is at that URL, put back at the end."""
    if not is_url(place):
        Path(place).mkdir(parents=True, exist_ok=True)
        yield Path(place)
        return
    work = Path(tempfile.mkdtemp(dir=local_directory(), prefix="run."))
    root = work / RemoteFolder(place).name  # figures and titles name the run
    try:
        mirror = Mirror(RemoteFolder(place), root)
        mirror.pull()
        yield root
        mirror.push()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _turn(path: str) -> tuple[bool, bool, str]:
    return (path.startswith(f"{CHECKPOINTS}/"), path.endswith(MARKS), path)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
