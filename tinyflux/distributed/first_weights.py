"""Weights that a run on a cluster begins with, from wherever its workers can read."""

from tinyflux.storage.copies import fetch
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_folder


class AnyPlace:
    """Directories and URLs, as :class:`tinyflux.trainer.init_from.Places` has them."""

    def open(self, place: str) -> Folder:
        """The folder at a path or URL."""
        return open_folder(place)

    def fetch(self, place: str, files: tuple[str, ...]) -> str:
        """The folder as a directory of this machine, with those of ``files``."""
        return fetch(place, files)
